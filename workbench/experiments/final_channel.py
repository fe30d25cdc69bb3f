"""Effects on the final channel: what interventions change of the log-probability of the final answers of a run.

All changes are paired: the same tokens, with and without the intervention; the sampling unit is the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments.effects import effects
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss
from workbench.studies.intervals import MIN_PROMPTS, SMALLEST_EFFECT, few_prompts
from workbench.studies.statistics import ALPHA

METHOD = (
    "Log-probability in nats of the final message, summed over its tokens, with the intervention less without, on the "
    "run's own tokens; means over prompts, bootstrap-t intervals over prompts. An effect has q of at most 0.05 "
    "(Benjamini–Hochberg over the interventions); no effect is called absent unless its 90 % interval lies within the "
    "stated smallest effect of interest."
)
NOT_CONTROLLED = (
    "An intervention takes the model off the states it was trained in; beside it stands the same intervention on "
    "controls where there are any. Accuracy of newly generated answers may change less, or more, than log-probability."
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
        InputError: they are of fewer than five prompts.
    """
    final = final_tokens(model)
    answered = [row for row in rows if final(row.tokens.astype(np.int64)).any()]
    if (n := len({row.prompt_id for row in answered})) < MIN_PROMPTS:
        raise InputError(f"{n} prompts have a final message, and an interval needs {MIN_PROMPTS}: use more sequences")
    return answered


def final_effects(
    model: GptOss,
    rows: Sequence[Transcript],
    what: Mapping[str, Edit | Sequence[Edit]],
    seed: int,
    title: str,
    *,
    smallest_effect: float = SMALLEST_EFFECT,
) -> xr.Dataset:
    """Return the effect of each intervention on the final channel, with its summary."""
    rows = answered_rows(model, rows)
    result = effects(model, rows, what, final_tokens(model), smallest_effect=smallest_effect, seed=seed)
    return result.assign_attrs(title=title, summary=describe_effects(result), method=METHOD)


def describe_effects(result: xr.Dataset) -> str:
    """Return the summary of `effects`: each intervention with its interval and verdict, the largest change first."""
    order = np.argsort(-np.abs(result["change"].values))
    lines = [
        f"{result.attrs['rests_on']}; change of the final message's log-probability, nats a sequence; "
        f"{result.attrs['family']} tested together:"
    ]
    for i in order:
        one = result.isel(intervention=int(i))
        lines.append(f"  {one['intervention'].item()}: {verdict(one, result.attrs)}")
    if warning := few_prompts(result.attrs["prompts"]):
        lines.append(f"Warning: {warning}.")
    return "\n".join(lines)


def verdict(one: xr.Dataset, attrs: Mapping[str, Any]) -> str:
    """Return an effect with its interval, and whether it is shown, is shown to be small, or neither."""
    change, low, high, q = (float(one[name]) for name in ("change", "low", "high", "q"))
    if np.isnan(low):
        prompts = count_of(attrs["prompts"], "prompt")
        return f"the same change of {signed(change, 2)} in all {prompts}: no interval can be given"
    interval = signed_interval(change, low, high, 2)
    if q <= ALPHA:
        small = f", smaller than {attrs['smallest_effect']:g}" if bool(one["equivalent"]) else ""
        return f"{interval}{small}"
    if bool(one["equivalent"]):
        return f"no effect of {attrs['smallest_effect']:g} or more, {interval}"
    return f"no effect shown, {interval}, q {q:.2f}"
