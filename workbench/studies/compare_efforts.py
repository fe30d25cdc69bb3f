"""Two runs by effort: agreement of routers, and differences of sinks and log-probabilities, by effort and channel.

Every number is a mean over the tokens of a sequence, the sequences of a prompt at one effort, and the prompts that have
the channel at that effort. Differences are tested together over all efforts, channels and layers of a quantity.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from workbench.harmony.labels import CHANNELS
from workbench.studies.comparison import in_order
from workbench.studies.intervals import MIN_PROMPTS, mean_of_prompts, mean_test, within_bounds
from workbench.studies.matching import prompt_means
from workbench.studies.result import Definition, Variables
from workbench.studies.statistics import ALPHA, false_discovery
from workbench.studies.wording import wording

_CI = "95 %, Student's t over prompts corrected for skewness"
_UNITS = {"sink_difference": "1", "logprob_difference": "nat"}
_TITLES = {"sink_difference": "difference of sink attention", "logprob_difference": "difference of log-probability"}
_HOW = {
    "sink_difference": "a − b of the same token, mean over the layer's heads, tokens of a sequence, sequences, prompts",
    "logprob_difference": "a − b of the same token, mean over the tokens of a sequence, sequences, prompts",
}


def _definitions() -> Iterator[tuple[str, Definition]]:
    for name, title in _TITLES.items():
        yield name, Definition(title, _UNITS[name], _HOW[name], ci=_CI)
        for end, limit in (("low", "lower"), ("high", "upper")):
            yield f"{name}_{end}", Definition(f"{title}, {limit} limit", _UNITS[name], f"{limit} limit", ci=_CI)
        yield f"{name}_p", Definition(f"{title}, p", "1", "two-sided, as the interval", null="no difference")
        yield f"{name}_q", Definition(f"{title}, q", "1", "Benjamini–Hochberg over efforts, channels and layers")
        yield f"{name}_different", Definition(f"{title}, differs", "1", f"q < {ALPHA} and the interval excludes zero")


DEFINITIONS = dict(_definitions())

# sums over the tokens [sequence channel …] and how many there are [sequence channel]
Sums = tuple[Float[np.ndarray, "sequence channel *cells"], Float[np.ndarray, "sequence channel"]]


def variables(
    effort: Sequence[str], number: Int[np.ndarray, " sequence"], quantities: Mapping[str, Sums]
) -> tuple[list[str], Variables]:
    """Return the efforts, and every quantity by effort and channel with its interval; differences with p and q.

    effort, number: of every sequence; number is that of its prompt. quantities: `agreement` and those that end in
    `_difference`, as sums over the tokens.
    """
    known, estimates = in_order(effort), Variables()
    at = [np.flatnonzero([e == one for e in effort]) for one in known]
    channels = range(len(CHANNELS))
    for name, (sums, tokens) in quantities.items():
        means = [[prompt_means(sums[own, c], tokens[own, c], number[own]) for c in channels] for own in at]
        dims = ("effort", "channel", *(("layer",) if sums.ndim > 2 else ()))
        estimates |= {key: (dims, values) for key, values in _estimates(name, means).items()}
    return known, estimates


def _estimates(name: str, means: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Return a quantity's mean over prompts and its interval, and the test of a difference [effort, channel, …]."""
    cells = [[mean_of_prompts(one) for one in row] for row in means]
    value, low, high = (np.array([[cell[i] for cell in row] for row in cells]) for i in range(3))
    if not name.endswith("_difference"):
        for i, row in enumerate(means):
            for c, one in enumerate(row):
                low[i, c], high[i, c] = within_bounds(value[i, c], low[i, c], high[i, c], len(one))
        return {name: value, f"{name}_low": low, f"{name}_high": high}
    p = np.array([[_p(one) for one in row] for row in means])
    q = np.asarray(false_discovery(p))
    tested = {f"{name}_p": p, f"{name}_q": q, f"{name}_different": (q < ALPHA) & (low * high > 0)}
    return {name: value, f"{name}_low": low, f"{name}_high": high} | tested


def _p(means: Float[np.ndarray, "prompt *cells"]) -> np.ndarray:
    """Return p of a mean of zero; NaN below five prompts."""
    n = len(means)
    if n < MIN_PROMPTS:
        return np.full(means.shape[1:], np.nan)
    value = means.mean(0)
    return np.asarray(mean_test(value, (means - value) / np.sqrt(n * (n - 1)), n - 1.0).p)


def summary(result: xr.Dataset) -> str:
    """Return one line for every effort and channel with tokens of an answer."""
    lines = []
    for effort in map(str, result["effort"].values):
        for channel in ("analysis", "commentary", "final"):
            cell = result.sel(effort=effort, channel=channel)
            if tokens := int(cell["tokens"]):
                lines.append(f"{effort}, {channel} ({tokens:,} tokens): {'; '.join(_sentences(cell))}.")
    return "\n".join(lines)


def _sentences(cell: xr.Dataset) -> Iterator[str]:
    if "agreement" in cell:
        yield f"routers agree on {float(cell['agreement'].mean()):.1%} of choices"
    if "logprob_difference" in cell:
        ends = [float(cell[f"logprob_difference{end}"]) for end in ("", "_low", "_high")]
        verdict = "" if bool(cell["logprob_difference_different"]) else " (not shown to differ)"
        verdict = verdict if np.isfinite(ends).all() else " (cannot be tested)"
        yield f"log-probability {wording('logprob').interval(*ends)} a token{verdict}"
    if "sink_difference" in cell:
        different = int(cell["sink_difference_different"].sum())
        yield f"sink attention differs in {different} of {cell.sizes['layer']} layers"
