"""Studies: pure functions from a run to labelled datasets, with intervals, nulls and definitions attached.

Nothing here draws and nothing here needs torch; figures take the datasets, dashboards and notebooks show the figures.
Every study module has `study(run, …) -> dict[str, xarray.Dataset]`; the table below is the list of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from workbench.studies import effort as effort
    from workbench.studies import result as result
    from workbench.studies import routing as routing
    from workbench.studies import statistics as statistics
    from workbench.studies.comparison import Run
    from workbench.studies.result import save as save
    from workbench.studies.result import summary as summary

STUDIES = ("routing", "sinks", "channels", "effort")  # of one run
COMPARISONS = ("compare",)  # of two
_MODULES = (
    "contrast",
    "quick_look",
    "resampling",
    "result",
    "specialization",
    "statistics",
    "synthetic",
    *STUDIES,
    *COMPARISONS,
)

__all__ = ["COMPARISONS", "STUDIES", "result", "routing", "run_study", "save", "statistics", "summary"]


def run_study(name: str, *runs: "Run", **options: Any) -> "dict[str, xr.Dataset]":
    """The datasets of one study by its name, of one run or, to compare, of two; options go to that study (`seed`, …)."""
    if name not in (*STUDIES, *COMPARISONS):
        raise InputError(f"no study is called {name!r}; the studies are {', '.join((*STUDIES, *COMPARISONS))}")
    wanted = 2 if name in COMPARISONS else 1
    if len(runs) != wanted:
        raise InputError(f"the study {name} is of {wanted} run{'s' if wanted > 1 else ''}, {len(runs)} given")
    datasets: dict[str, xr.Dataset] = importlib.import_module(f"workbench.studies.{name}").study(*runs, **options)
    return datasets


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"workbench.studies.{name}")
    if name in ("save", "summary"):
        return getattr(importlib.import_module("workbench.studies.result"), name)
    raise AttributeError(f"module 'workbench.studies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__all__})
