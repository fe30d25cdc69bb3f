"""Studies: pure functions from a run to labelled datasets, with intervals, nulls and definitions attached.

Nothing here draws and nothing here needs torch; figures take the datasets, dashboards and notebooks show the figures.
Every study is one module with a record and `study(run, …) -> dict[str, xarray.Dataset]` (see `workbench.registry`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from workbench import registry
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

# modules that are not studies themselves
_MODULES = (
    "contrast",
    "expert_labels",
    "feature_pages",
    "label_proposals",
    "quick_look",
    "resampling",
    "result",
    "specialization",
    "statistics",
    "synthetic",
)

__all__ = ["result", "run_study", "save", "statistics", "summary"]


def run_study(name: str, *runs: "Run", **options: Any) -> "dict[str, xr.Dataset]":
    """Return the datasets of a study, of one run or of two to compare; options go to the study (`seed`, …).

    Raises:
        InputError: no study has this name or option, or the runs do not have what the study needs.
    """
    from workbench.studies.layer_experts import mask_absent
    from workbench.studies.result import name_few_prompts

    record = registry.find(name)
    if not isinstance(record, registry.Study):
        raise InputError(f"{name} is an experiment and needs the model: use workbench.experiments.registry")
    if len(runs) != record.runs:
        raise InputError(f"{name} takes {record.runs} run{'s' if record.runs > 1 else ''}, {len(runs)} given")
    for run in runs:
        record.check_recorded(run)
    study = record.load().study
    datasets: dict[str, xr.Dataset] = study(*runs, **record.checked_options(study, options))
    datasets = {name: mask_absent(result, runs[0]) for name, result in datasets.items()}
    _name_duplicates(datasets, *runs)
    n = min(_independent_prompts(run) for run in runs)
    for result in datasets.values():
        name_few_prompts(result, n)
    return _name_excluded(datasets, *runs)


def _name_duplicates(datasets: "dict[str, xr.Dataset]", *runs: "Run") -> None:
    """Warn in every dataset of prompts that repeat others, which count as one, and of ids that have several prompts."""
    from workbench.studies.run_index import TokenRun, ambiguous_warning, duplicates_warning, index_of

    ambiguous = max(index_of(run).ambiguous_ids if isinstance(run, TokenRun) else 0 for run in runs)
    for result in datasets.values() if ambiguous else ():
        result.attrs["ambiguous_prompt_ids"] = ambiguous
        result.attrs["summary"] = f"{ambiguous_warning(ambiguous)}\n{result.attrs['summary']}"
    merged = max(index_of(run).prompts[1] if isinstance(run, TokenRun) else 0 for run in runs)
    for result in datasets.values() if merged else ():
        if "duplicate_prompts" not in result.attrs:
            result.attrs["duplicate_prompts"] = merged
            result.attrs["summary"] = f"{duplicates_warning(merged)}\n{result.attrs['summary']}"


def _independent_prompts(run: "Run") -> int:
    """Return the number of prompts of a run, duplicates counted once."""
    from workbench.studies.run_index import TokenRun, index_of, merged_prompts

    number = index_of(run).prompts[0] if isinstance(run, TokenRun) else merged_prompts(run, run.summary("tokens"))[0]
    return len(set(number[number >= 0].tolist()))


def _name_excluded(datasets: "dict[str, xr.Dataset]", *runs: "Run") -> "dict[str, xr.Dataset]":
    """Say in every dataset how many sequences of the runs were left out, if any were."""
    texts = dict.fromkeys(text for run in runs if (text := getattr(run, "exclusion", "")))
    for result in datasets.values() if texts else ():
        result.attrs["excluded"] = "; ".join(texts)
        result.attrs["summary"] = f"{result.attrs['summary']}\n{result.attrs['excluded']}."
    return datasets


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"workbench.studies.{name}")
    if name in ("save", "summary"):
        return getattr(importlib.import_module("workbench.studies.result"), name)
    record = registry.attributes().get(name)
    if isinstance(record, registry.Study):
        return record.load()
    raise AttributeError(f"module 'workbench.studies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__all__, *(study.attribute for study in registry.studies())})
