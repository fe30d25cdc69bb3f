"""Attention knockout: the tokens of one channel do not attend to those of another.

Reference: Geva et al. 2023, arXiv 2304.14767.
"""

from collections.abc import Sequence
from typing import Any

import xarray as xr

from workbench.experiments import chain_of_thought
from workbench.experiments.final_channel import final_effects
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import knockout
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="attention-knockout",
    title="Attention knockout between channels",
    question="Does the final answer depend on attention to the analysis, and on attention to the user's message?",
    compute="forward passes over the sequences: seven",
    aliases=("knockout",),
    order=160,
)


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the effects of attention knockouts on the final channel."""

    def tokens(**asked: Any) -> TokenSet:
        return token_set(tokenizer=model.tokenizer, **asked)

    layers = list(range(model.cfg.n_layers))
    kinds = {
        "all layers": layers,
        "full layers": [i for i in layers if model.cfg.windows[i] is None],
        "window layers": [i for i in layers if model.cfg.windows[i] is not None],
    }
    thinking, behind, asked = tokens(channel="analysis"), tokens(message=-1), tokens(role="user")
    thoughtful = [t.row for t in chain_of_thought.thoughts(model, rows)]
    what: dict[str, Edit | Sequence[Edit]] = {}
    for kind, chosen in kinds.items():
        if chosen:
            what[f"final does not see analysis, {kind}"] = knockout(chosen, behind, thinking)
            what[f"final does not see the user, {kind}"] = knockout(chosen, behind, asked)
    what["analysis does not see the user, all layers"] = knockout(layers, thinking, asked)
    return {"attention": final_effects(model, thoughtful, what, seed, "Attention between channels knocked out")}
