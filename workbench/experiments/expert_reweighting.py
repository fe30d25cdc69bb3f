"""Expert reweighting: the gate weights of the experts that routing associates with a domain are halved."""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments.expert_sets import change_experts
from workbench.experiments.random_controls import CONTROLS
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import reweight
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="expert-reweighting",
    title="Halved gate weights",
    question="What changes when the gate weights of the experts that routing associates with a domain are halved?",
    compute="forward passes over the sequences: one for each group of prompts, and 99 for its random sets",
    cost={"passes": 100},
    options={"controls": "Random sets of experts of the same load for each group, at least 20 (default: 99)."},
    aliases=("reweight",),
    order=140,
)


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, controls: int = CONTROLS, seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the effect of halving the gate weights of a group's experts, on its prompts and on the others.

    controls: random sets of the same load, the null of the test; at least 20.
    """
    return change_experts(
        model,
        rows,
        seed,
        lambda layer, e, t: reweight(layer, e, 0.5, t),
        "Experts named by routing, gates halved",
        controls=controls,
    )
