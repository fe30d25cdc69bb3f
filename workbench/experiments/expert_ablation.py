"""Expert ablation: the experts that routing associates with a domain are masked before the top-k selection."""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments.expert_sets import change_experts
from workbench.experiments.random_controls import CONTROLS
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import forbid
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="expert-ablation",
    title="Expert ablation",
    question="Does the model need the experts that routing associates with a domain more than random experts of "
    "equal load?",
    compute="forward passes over the sequences: one for each group of prompts, and 99 for its random sets",
    cost={"passes": 100},
    options={"controls": "Random sets of experts of the same load for each group, at least 20 (default: 99)."},
    aliases=("ablate",),
    order=120,
)


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, controls: int = CONTROLS, seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the effect of masking a group's experts before the top-k selection, on its prompts and on the others.

    controls: random sets of the same load, the null of the test; at least 20.
    """
    return change_experts(model, rows, seed, forbid, "Experts named by routing, masked before top-k", controls=controls)
