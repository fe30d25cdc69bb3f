"""Expert ablation: the experts that routing associates with a domain are masked before the top-k selection."""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments.expert_sets import change_experts
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import forbid
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="expert-ablation",
    title="Expert ablation",
    question="Does the model need the experts that routing associates with a domain more than random experts of "
    "equal load?",
    compute="forward passes over the sequences: one for each group of prompts and each of its 20 control sets",
    aliases=("ablate",),
    order=120,
)


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the effect of masking a group's experts before the top-k selection, on its prompts and on the others."""
    return change_experts(model, rows, seed, forbid, "Experts named by routing, forbidden")
