"""The datasets of the figures: one with everything in it, and a layer and a channel that are missing."""

import dataclasses

import pytest

from workbench.studies import routing
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
