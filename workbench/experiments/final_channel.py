"""Effects on the final channel: what interventions change of the log-probability of the final answers of a run.

All changes are paired: the same tokens, with and without the intervention; the sampling unit is the prompt.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.experiments.effects import effects
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss

METHOD = (
    "Log-probability in nats of the final message, summed over its tokens, with the intervention less without, on the "
    "run's own tokens; means over prompts, percentile bootstrap over prompts. Nothing is called an effect whose "
    "interval "
    "includes zero."
)
NOT_CONTROLLED = (
    "An intervention takes the model off the states it was trained in; beside it stands the same intervention "
    "on controls "
    "where there are any. Accuracy of newly generated answers may change less, or more, than log-probability."
)


def final_tokens(model: GptOss) -> TokenSet:
    """Return the tokens of the final channel."""
    return token_set(tokenizer=model.tokenizer, channel="final")


def generated_tokens(model: GptOss) -> TokenSet:
    """Return the tokens of the analysis and final channels."""
    return token_set(tokenizer=model.tokenizer, channel=["analysis", "final"])


def answered_rows(model: GptOss, rows: Sequence[Transcript]) -> list[Transcript]:
    """Return the sequences that have tokens in the final channel.

    Raises:
        InputError: they are of fewer than two prompts.
    """
    final = final_tokens(model)
    found = [row for row in rows if final(row.tokens.astype(np.int64)).any()]
    if len({row.prompt_id for row in found}) < 2:
        raise InputError("fewer than two prompts of the run have a final message: there is no answer to measure")
    return found


def final_effects(
    model: GptOss, rows: Sequence[Transcript], what: Mapping[str, Edit | Sequence[Edit]], seed: int, title: str
) -> xr.Dataset:
    """Return the effect of each intervention on the final channel, with its summary."""
    rows = answered_rows(model, rows)
    result = effects(model, rows, what, final_tokens(model), seed=seed)
    return result.assign_attrs(title=title, summary=describe_effects(result), method=METHOD)


def describe_effects(result: xr.Dataset) -> str:
    """Effects in plain describe_effects, largest first."""
    order = np.argsort(-np.abs(result["change"].values))
    lines = [f"{result.attrs['rests_on']}; change of the final message's log-probability, nats a sequence:"]
    for i in order:
        one = result.isel(intervention=int(i))
        low, high = float(one["low"]), float(one["high"])
        said = f"{float(one['change']):+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"  {one['intervention'].item()}: {said if low * high > 0 else f'no effect shown, {said}'}")
    return "\n".join(lines)
