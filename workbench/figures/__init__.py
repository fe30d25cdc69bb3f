"""Figures: pure functions from a study's dataset to a plotly figure, and their export for a paper.

No figure opens a run, resamples or keeps state; what it shows is in the dataset it was given. A module of the same name
as a study has its `gallery`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.figures import channels as channels
    from workbench.figures import compare as compare
    from workbench.figures import contrast as contrast
    from workbench.figures import effects as effects
    from workbench.figures import effort as effort
    from workbench.figures import experiments as experiments
    from workbench.figures import export as export
    from workbench.figures import paper as paper
    from workbench.figures import quick_look as quick_look
    from workbench.figures import routing as routing
    from workbench.figures import sinks as sinks
    from workbench.figures import template as template

__all__ = [
    "channels",
    "compare",
    "contrast",
    "effects",
    "effort",
    "experiments",
    "export",
    "paper",
    "quick_look",
    "routing",
    "sinks",
    "template",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"workbench.figures.{name}")
    raise AttributeError(f"module 'workbench.figures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
