"""Figures: pure functions from a study's dataset to a plotly figure, and their export for a paper.

No figure opens a run, resamples or keeps state; what it shows is in the dataset it was given. `wb.figures.STUDY` is the
module whose `gallery(datasets)` draws the results of a study or experiment, as its record in the registry states.
"""

import importlib
from typing import TYPE_CHECKING, Any

from workbench import registry

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

# modules that are not the figures of one study
_MODULES = ("contrast", "default", "effects", "experiments", "export", "paper", "quick_look", "template")

__all__ = ["contrast", "effects", "experiments", "export", "paper", "quick_look", "template"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"workbench.figures.{name}")
    record = registry.attributes().get(name)
    if record is not None:
        return record.load_figures()
    raise AttributeError(f"module 'workbench.figures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *registry.attributes()})
