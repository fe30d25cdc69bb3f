"""Figures: pure functions from a study's dataset to a plotly figure, and their export for a paper.

No figure opens a run, resamples or keeps state; what it shows is in the dataset it was given.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.figures import effects as effects
    from workbench.figures import export as export
    from workbench.figures import routing as routing
    from workbench.figures import template as template

_MODULES = ("effects", "export", "routing", "template")

__all__ = ["effects", "export", "routing", "template"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"workbench.figures.{name}")
    raise AttributeError(f"module 'workbench.figures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
