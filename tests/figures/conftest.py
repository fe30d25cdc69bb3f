"""The datasets of the figures: one with everything in it, and a layer and a channel that are missing."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.figures import paper, report
from workbench.runs import Run
from workbench.studies import routing, run_study
from workbench.studies.synthetic import planted_run


@pytest.fixture(scope="session")
def datasets():
    run = planted_run(
        seed=4,
        n_prompts=24,
        channel_shift={"final": {1: 0.6}},
        lengths={"prompt": 20, "analysis": 30, "final": 6},
    )
    counts = run.summary("expert_count").copy(deep=True)
    counts.loc[{"layer": 2}] = 0
    run = dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts})
    return routing.study(run, n_boot=200, n_permutations=500)


@pytest.fixture
def load(datasets):
    return datasets["load"]


@pytest.fixture
def div(datasets):
    return datasets["analysis_vs_final"]


@cache
def study_of_demo(name: str) -> dict[str, xr.Dataset]:
    """The result of a study of the demo run, computed once; read only."""
    return run_study(name, wb.open_run(DATA / "demo.zarr"))


@contextmanager
def shared_studies() -> Iterator[None]:
    """Let figures and reports of the demo run share the results of its studies, which take a while."""
    digest = wb.open_run(DATA / "demo.zarr").digest

    def shared(name: str, run: Run, seed: int = 0) -> dict[str, xr.Dataset]:
        return study_of_demo(name) if run.digest == digest and seed == 0 else run_study(name, run, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        for module in (paper, report):
            patch.setattr(module, "run_study", shared)
        yield
