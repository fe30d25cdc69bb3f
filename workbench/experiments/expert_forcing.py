"""Expert forcing: the expert that routing associates most with a domain is selected at every generated token."""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments.expert_sets import change_experts
from workbench.experiments.random_controls import CONTROLS
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import force
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="expert-forcing",
    title="Forced experts",
    question="What changes when the expert that routing associates most with a domain is selected at every token?",
    compute="forward passes over the sequences: one for each group of prompts, and 99 for its random sets",
    cost={"passes": 100},
    options={"controls": "Random sets of experts of the same load for each group, at least 20 (default: 99)."},
    aliases=("force",),
    order=130,
)


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, controls: int = CONTROLS, seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the effect of selecting a group's experts at every token, on its prompts and on the others.

    controls: random sets of the same load, the null of the test; at least 20.
    """
    return change_experts(
        model,
        rows,
        seed,
        lambda layer, e, t: force(layer, e[:1], t),
        "Experts named by routing, forced",
        controls=controls,
    )
