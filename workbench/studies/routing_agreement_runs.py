"""Routing agreement of two runs on the same transcripts: precisions, batch sizes, engines or repeated passes."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.registry import Study
from workbench.studies.intervals import mean_of_prompts
from workbench.studies.matching import prompt_means
from workbench.studies.result import Definition, provenance
from workbench.studies.routing_agreement import Compared, agreement
from workbench.studies.run_index import TokenRun, independent_prompts, token_blocks

STUDY = Study(
    name="routing-agreement-runs",
    title="Routing agreement of two runs",
    question="Where do two passes over the same tokens route them to different experts?",
    requires=("routing",),
    compute="one pass over the tokens of both runs; jackknife over prompts",
    runs=2,
    page="compare",
    order=61,
)
_EFFECT = Definition(
    "effect on log-probability", "nat", "|a − b|, mean over prompts", ci="95 %, Student's t over prompts, at least 0"
)


def study(run: TokenRun, other: TokenRun, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the agreement of the experts of two runs, and how much their log-probabilities differ.

    Raises:
        InputError: the runs hold different sequences, or the models differ in layers or experts.
    """
    if list(run.sequences["id"]) != list(other.sequences["id"]):
        raise InputError("the two runs hold different sequences: capture the same transcripts with both")
    keys = ("n_layers", "num_experts", "experts_per_token", "layer_experts")
    if any(run.model.get(key) != other.model.get(key) for key in keys):
        raise InputError("the two models differ in layers or experts: their experts do not correspond")
    effect: list[tuple[np.ndarray, np.ndarray]] = []
    title = "Routing agreement of two runs"
    attrs = provenance("routing-agreement-runs", title, run.digest, seed, {"other": other.digest})
    result = agreement(run, _compared(run, other, effect), attrs, "both runs")
    sequence, difference = (np.concatenate(parts) for parts in zip(*effect, strict=True))
    known = np.isfinite(difference)
    number, own = independent_prompts(run), sequence[known]
    sums, counts = (np.bincount(own, values, len(number)) for values in (difference[known], None))
    value = mean_of_prompts(prompt_means(sums, counts, number))
    for end, limit in zip(("", "_low", "_high"), value, strict=True):
        result[f"logprob_effect{end}"] = ((), np.maximum(limit, 0), _EFFECT.attrs())
    if known.any():
        result.attrs["summary"] += f"\nLog-probabilities differ by {float(value[0]):.4f} nat a token on average."
    return {"agreement": result}


def _compared(run: TokenRun, other: TokenRun, effect: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Compared]:
    recorded = [getattr(r, "recorded", ["router_logits", "logprobs"]) for r in (run, other)]
    logprobs = ["logprob"] if all("logprobs" in names for names in recorded) else []
    own = ["router_logits"] if "router_logits" in recorded[0] else []
    for x, y in zip(
        token_blocks(run, "compare runs", "id", "experts", *logprobs, *own),
        other.blocks("id", "experts", *logprobs),
        strict=True,
    ):
        if not np.array_equal(x["id"], y["id"]):
            raise InputError("the two runs are laid out differently: capture both with the same --unit-tokens")
        differs = np.abs(x["logprob"] - y["logprob"]) if logprobs else np.full(len(x["id"]), np.nan)
        effect.append((x["sequence"], differs))
        margin = _margin(x["router_logits"], int(run.model["experts_per_token"])) if own else None
        yield x, x["experts"], y["experts"], margin, np.ones(len(x["id"]), dtype=bool)


def _margin(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th less the (k+1)-th largest logit; NaN is an expert that the layer does not have."""
    logits = np.where(np.isnan(logits), -np.inf, logits)
    last = logits.shape[-1] - k
    ordered = np.partition(logits.astype(np.float32), (last - 1, last), axis=-1)
    margin: np.ndarray = ordered[..., last] - ordered[..., last - 1]
    return margin
