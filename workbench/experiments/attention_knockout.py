"""Attention knockout: the tokens of one message do not attend to those of another.

Whole messages are hidden, frame tokens included: the `<|end|>` of an analysis message has read all of it, and a final
message that still attends to this token has hardly lost the analysis.

Reference: Geva et al. 2023, arXiv 2304.14767.
"""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments import chain_of_thought
from workbench.experiments.final_channel import final_effects
from workbench.experiments.hidden_messages import Hidden, Hide, add_readers, layer_kinds, message_tokens
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import knockout
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="attention-knockout",
    title="Attention knockout between channels",
    question="Does the final answer depend on attention to the analysis, and on attention to the user's message?",
    compute="forward passes over the sequences: seven",
    cost={"passes": 7},
    options={"hide": "What is hidden: messages, with their frame tokens (default), or their content alone."},
    aliases=("knockout",),
    order=160,
)


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, hide: Hide = "messages", seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the effects of attention knockouts on the final channel, and which visible tokens have read hidden ones.

    hide: whole messages with their frame tokens, or their content alone, which leaks through the frame tokens.
    """
    analysis = message_tokens(model.tokenizer, channel="analysis", hide=hide)
    user = message_tokens(model.tokenizer, role="user", hide=hide)
    final, analysis_queries = (
        token_set(tokenizer=model.tokenizer, message=-1),
        message_tokens(model.tokenizer, channel="analysis"),
    )
    what = {}
    for kind, layers in layer_kinds(model).items():
        what[f"final does not see analysis, {kind}"] = Hidden(layers, final, analysis)
        what[f"final does not see the user, {kind}"] = Hidden(layers, final, user)
    what["analysis does not see the user, all layers"] = Hidden(list(range(model.cfg.n_layers)), analysis_queries, user)
    answered = [part.row for part in chain_of_thought.answered_sequences(model, rows)]
    edits = {name: knockout(*hidden) for name, hidden in what.items()}
    result = final_effects(model, answered, edits, seed, "Attention between channels knocked out")
    return {"attention": add_readers(result, "intervention", answered, what, model.tokenizer)}
