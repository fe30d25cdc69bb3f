"""A difference between two sets of tokens, as it is and at equal position, with intervals over prompts.

What tokens have (the experts they go to, what their heads leave on the sink) is averaged on either side, and the sides
are subtracted. Analysis comes before final and high effort is longer, so a difference may be one of position alone.
The control compares tokens at like positions only: positions are put into strata so narrow that they are like and so
wide that several prompts stand on both sides, differences are taken within each, and averaged with the weight
n_a n_b / (n_a + n_b), which is that of the two-sample comparison with the least variance. Position is also the number
of keys that a full layer sees, on which sink attention depends by arithmetic.

The sampling unit is the prompt. What the difference would be without a prompt (the weights of the strata kept) gives
its influence, the sum of its tokens' deviations from their stratum's mean; the influences' spread is the standard
error (the delete-one jackknife over prompts), and the interval and p are Student's with one degree of freedom fewer
than prompts.

Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11; MacKinnon & White 1985 (HC3).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import xarray as xr
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.studies.comparison import in_second_half, prompt_numbers
from workbench.studies.resampling import LEVEL
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.statistics import false_discovery

ALPHA = 0.05
CONTROLS = ("none", "position")
LEAST_PROMPTS = 8  # of a stratum, on either side
WIDEST = 1.25  # last over first position of a stratum
SLACK = 4  # positions that a stratum may span whatever their ratio

Between = Literal["channel", "effort", "task", "half"]
Block = Mapping[str, np.ndarray]


@runtime_checkable
class TokenRun(Protocol):
    """What a study of single tokens needs of a run."""

    @property
    def digest(self) -> str: ...

    @property
    def sequences(self) -> pd.DataFrame: ...

    @property
    def model(self) -> Mapping[str, Any]: ...

    def blocks(self, *names: str) -> Iterator[Block]: ...


_CI = f"{LEVEL:.0%}, delete-one jackknife over prompts, Student's t"
DEFINITIONS = {
    "mean_a": Definition("mean in a", "1", "mean over tokens of a; at equal position, over strata with their weights"),
    "mean_b": Definition("mean in b", "1", "mean over tokens of b, likewise"),
    "difference": Definition("difference", "1", "mean_a − mean_b", ci=_CI),
    "low": Definition("difference, lower limit", "1", "lower limit of difference", ci=_CI),
    "high": Definition("difference, upper limit", "1", "upper limit of difference", ci=_CI),
    "p": Definition("p", "1", "two-sided, Student's t with prompts − 1 degrees of freedom", null="no difference"),
    "q": Definition("q", "1", "Benjamini–Hochberg over all cells of this comparison and control"),
    "different": Definition("differs", "1", f"q < {ALPHA} and the interval excludes zero"),
    "size": Definition("size by layer", "1", "root of the summed squares of the difference over the layer's cells"),
    "noise": Definition("size that noise alone has", "1", "root of the summed squared standard errors of the layer"),
    "tokens_a": Definition("tokens of a", "tokens", "tokens that take part"),
    "tokens_b": Definition("tokens of b", "tokens", "tokens that take part"),
    "prompts": Definition("prompts", "prompts", "prompts with tokens that take part"),
    "strata": Definition("strata", "strata", "strata of position with enough prompts on both sides"),
}
METHOD = (
    "Tokens are averaged on either side and subtracted; the sampling unit is the prompt (jackknife, Student's "
    "t). Control 'none' takes all tokens; control 'position' takes tokens at like positions: strata at most "
    f"{WIDEST - 1:.0%} or {SLACK} positions wide with at least {LEAST_PROMPTS} prompts on either side, "
    "differences within "
    "each, averaged with weight n_a n_b / (n_a + n_b). A cell is called different only if q < 0.05 "
    "(Benjamini–Hochberg) "
    "and its interval excludes zero."
)
NOT_CONTROLLED = (
    "Words and tasks are not matched. At like positions other prompts stand on either side of the comparison."
)


def contrast(
    run: TokenRun,
    what: str,
    between: Between,
    a: str,
    b: str,
    *,
    channel: str | None = None,
    effort: str | None = None,
    task: str | None = None,
    study: str = "contrast",
    seed: int = 0,
) -> xr.Dataset:
    """Difference of `what` (experts, sink, entropy, logprob) between a and b, with and without the control.

    between channels: a and b are channels. Efforts and tasks: those of `channel`'s tokens. Halves: `first` and
    `second` of `channel`'s tokens in each sequence. effort, task: hold these fixed. Dimensions: control, and what a
    token has: (layer, expert), (layer, head) or none.
    """
    sides = _Sides(run, between, a, b, channel, effort, task)
    measure = _measure(run, what)
    found = [_difference(run, measure, sides, control) for control in CONTROLS]
    dims = ("control", *measure.dims)
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (dims, np.stack([each[name] for each in found]))
        for name in ("mean_a", "mean_b", "difference", "low", "high", "p", "q", "different")
    }
    if measure.dims:
        variables |= {n: (dims[:2], np.stack([each[n] for each in found])) for n in ("size", "noise")}
    counts = ("tokens_a", "tokens_b", "prompts", "strata")
    variables |= {n: (("control",), np.array([each[n] for each in found])) for n in counts}
    fixed = {"channel": channel, "effort": effort, "task": task}
    title = f"{measure.title}: {sides.named(0)} against {sides.named(1)}"
    parameters = {"what": what, "between": between, "a": a, "b": b, **fixed}
    attrs = provenance(study, title, run.digest, seed, parameters) | {
        "between": between,
        "a": sides.named(0),
        "b": sides.named(1),
        "what": what,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"control": list(CONTROLS)} | {d: np.arange(n) for d, n in zip(measure.dims, measure.shape, strict=True)}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = words(result)
    return result


class _Sides:
    """Which side of the comparison each token is on: 0, 1, or −1 for neither."""

    def __init__(
        self, run: TokenRun, between: Between, a: str, b: str, channel: str | None, effort: str | None, task: str | None
    ) -> None:
        self.between, self.labels, self.within = between, (a, b), channel
        table = run.sequences
        if between != "channel" and channel not in CHANNELS:
            raise InputError(f"a comparison between {between}s needs a channel to look at: {', '.join(CHANNELS)}")
        if between == "channel" and (unknown := {a, b} - set(CHANNELS)):
            raise InputError(f"channel {min(unknown)!r} is unknown; choose from {', '.join(CHANNELS)}")
        for name in ("effort", "task"):
            wanted = [a, b] if between == name else [v for v in ({"effort": effort, "task": task}[name],) if v]
            if missing := [w for w in wanted if w not in set(table[name])]:
                raise InputError(
                    f"{name} {missing[0]!r} is not in this run; it has {', '.join(sorted(set(table[name])))}"
                )
        size = int(table.index.max()) + 1 if len(table) else 0
        self.prompt = prompt_numbers(table)
        self.allowed = np.zeros(size, dtype=bool)
        chosen = pd.Series(True, index=table.index)
        for name, value in (("effort", effort), ("task", task)):
            chosen &= True if value is None else table[name] == value
        self.allowed[table.index] = chosen
        self.of_sequence = np.full(size, -1)
        if between in ("effort", "task"):
            for side, label in enumerate((a, b)):
                self.of_sequence[table.index[table[between] == label]] = side

    def named(self, side: int) -> str:
        label = self.labels[side]
        if self.between == "half":
            return f"the {label} half of {self.within}"
        return (
            label
            if self.between == "channel"
            else f"{self.within} at {label} effort"
            if self.between == "effort"
            else f"{self.within} in {label}"
        )

    def __call__(self, block: Block) -> Int[np.ndarray, " token"]:
        sequence, channel = block["sequence"], block["channel"]
        if self.between == "channel":
            side = np.full(len(sequence), -1)
            for number, label in enumerate(self.labels):
                side[channel == CHANNELS.index(label)] = number
        else:
            inside = channel == CHANNELS.index(str(self.within))
            if self.between == "half":
                half = in_second_half(sequence, inside).astype(np.int64)
                side = np.where(inside, half if self.labels == ("first", "second") else 1 - half, -1)
            else:
                side = np.where(inside, self.of_sequence[sequence], -1)
        return np.where(self.allowed[sequence], side, -1)


class _Measure:
    """What is averaged: sums of it over groups of tokens."""

    def __init__(
        self,
        title: str,
        reads: tuple[str, ...],
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        sums: Callable[[Block, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray],
    ) -> None:
        self.title, self.reads, self.dims, self.shape, self.sums = title, reads, dims, shape, sums


def _measure(run: TokenRun, what: str) -> _Measure:
    model = run.model
    layers, experts, heads, k = (model[n] for n in ("n_layers", "num_experts", "n_heads", "experts_per_token"))

    def dense(name: str) -> Callable[[Block, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]:
        def sums(block: Block, at: np.ndarray, group: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
            values = block[name]
            values = (values[:, at].swapaxes(0, 1) if values.ndim == 3 else values[at]).astype(np.float64)
            take = scipy.sparse.csr_array((weight, (group, np.arange(len(at)))), shape=(n, len(at)))
            return np.asarray(take @ values.reshape(len(at), -1)).reshape(n, *values.shape[1:])

        return sums

    def chosen(block: Block, at: np.ndarray, group: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
        out = np.empty((n, layers, experts))
        for layer in range(layers):
            cell = group[:, None] * experts + block["experts"][layer, at]
            counted = np.bincount(cell.ravel(), np.repeat(weight / k, k), n * experts)
            out[:, layer] = counted.reshape(n, experts)
        return out

    known = {
        "experts": _Measure("Share of routed slots", ("experts",), ("layer", "expert"), (layers, experts), chosen),
        "sink": _Measure("Probability on the sink", ("sink",), ("layer", "head"), (layers, heads), dense("sink")),
        "entropy": _Measure("Entropy of the prediction, nat", ("entropy",), (), (), dense("entropy")),
        "logprob": _Measure("Log-probability of the token, nat", ("logprob",), (), (), dense("logprob")),
    }
    if what not in known:
        raise InputError(f"what={what!r} is not possible; choose from {', '.join(known)}")
    return known[what]


def _difference(run: TokenRun, measure: _Measure, sides: _Sides, control: str) -> dict[str, Any]:
    """Everything of one control."""
    stratum_of = _strata(run, sides, control)
    n_strata, n_prompts = int(stratum_of.max(initial=-1)) + 1, int(sides.prompt.max(initial=-1)) + 1
    if not n_strata:
        return _nothing(measure)
    totals = np.zeros((2 * n_strata, *measure.shape))
    tokens = np.zeros(2 * n_strata)
    pairs: list[np.ndarray] = []
    for block, at, side, stratum in _taking_part(run, measure.reads, sides, stratum_of):
        group = side * n_strata + stratum
        totals += measure.sums(block, at, group, np.ones(len(at)), 2 * n_strata)
        tokens += np.bincount(group, minlength=2 * n_strata)
        pairs.append(group * n_prompts + sides.prompt[block["sequence"][at]])
    pair, held = np.unique(np.concatenate(pairs), return_counts=True)
    # a stratum's mean leans towards each of its prompts; without the prompt it would lie so much farther from it
    farther = 1 / np.maximum(1 - held / tokens[pair // n_prompts], 0.1)
    means = totals / tokens.reshape(-1, *[1] * len(measure.shape))
    n = tokens.reshape(2, -1)
    weight = n.prod(0) / n.sum(0)
    weight /= weight.sum()
    mean_a, mean_b = (np.tensordot(weight, means.reshape(2, n_strata, *measure.shape)[s], 1) for s in (0, 1))
    scale = np.tile(weight, 2) / tokens * np.repeat([1, -1], n_strata)
    influence = np.zeros((n_prompts, *measure.shape))
    seen = np.zeros(n_prompts, dtype=bool)
    for block, at, side, stratum in _taking_part(run, measure.reads, sides, stratum_of):
        group, prompt = side * n_strata + stratum, sides.prompt[block["sequence"][at]]
        seen[prompt] = True
        weigh = scale[group] * farther[np.searchsorted(pair, group * n_prompts + prompt)]
        influence += measure.sums(block, at, prompt, weigh, n_prompts)
        weights = scipy.sparse.csr_array((weigh, (prompt, group)), shape=(n_prompts, 2 * n_strata))
        influence -= np.asarray(weights @ means.reshape(2 * n_strata, -1)).reshape(influence.shape)
    return _tested(measure, mean_a, mean_b, influence[seen]) | {
        "tokens_a": n[0].sum(),
        "tokens_b": n[1].sum(),
        "prompts": int(seen.sum()),
        "strata": n_strata,
    }


def _tested(
    measure: _Measure, mean_a: np.ndarray, mean_b: np.ndarray, influence: Float[np.ndarray, "prompt *cells"]
) -> dict[str, Any]:
    n, difference = len(influence), np.asarray(mean_a - mean_b)
    if n < 2:
        raise InputError(f"{n} prompt has tokens on both sides, and at least 2 are needed")
    error = np.sqrt(((influence - influence.mean(0)) ** 2).sum(0) * (n - 1) / n)
    t = np.divide(difference, error, out=np.full(difference.shape, np.nan), where=error > 0)
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
    # a cell in which no token of any prompt differs from the others has been measured, and is no difference
    p = np.where(np.isnan(t), np.where(difference == 0, 1.0, np.nan), 2 * scipy.stats.t.sf(np.abs(t), n - 1))
    q = false_discovery(p)
    found = {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
    }
    found |= {"p": p, "q": q, "different": (q < ALPHA) & ((difference - half) * (difference + half) > 0)}
    if measure.dims:
        found |= {"size": np.sqrt((difference**2).sum(-1)), "noise": np.sqrt((error**2).sum(-1))}
    return found


def _nothing(measure: _Measure) -> dict[str, Any]:
    """Of a control for which too few prompts stand on both sides."""
    names = ("mean_a", "mean_b", "difference", "low", "high", "p", "q")
    found: dict[str, Any] = {name: np.full(measure.shape, np.nan) for name in names}
    found |= {"different": np.zeros(measure.shape, dtype=bool), "tokens_a": 0, "tokens_b": 0, "prompts": 0, "strata": 0}
    return found | ({n: np.full(measure.shape[:1], np.nan) for n in ("size", "noise")} if measure.dims else {})


def _taking_part(
    run: TokenRun, reads: tuple[str, ...], sides: _Sides, stratum_of: np.ndarray
) -> Iterator[tuple[Block, np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks, and of their tokens that are on a side and in a stratum: places, side and stratum."""
    for block in run.blocks(*reads):
        side = sides(block)
        stratum = stratum_of[block["position"]]
        usable = (side >= 0) & (stratum >= 0)
        for name in reads:
            if block[name].ndim == 1:
                usable &= np.isfinite(block[name])  # nothing predicted a sequence's first token
        at = np.flatnonzero(usable)
        if len(at):
            yield block, at, side[at], stratum[at]


def _strata(run: TokenRun, sides: _Sides, control: str) -> Int[np.ndarray, " position"]:
    """The stratum of every position, −1 for one that takes no part."""
    found: list[np.ndarray] = []
    n_prompts = int(sides.prompt.max(initial=-1)) + 1
    longest = 0
    for block in run.blocks():
        side = sides(block)
        longest = max(longest, int(block["position"].max(initial=-1)) + 1)
        at = np.flatnonzero(side >= 0)
        code = (block["position"][at].astype(np.int64) * 2 + side[at]) * n_prompts + sides.prompt[block["sequence"][at]]
        found.append(np.unique(code))
    codes = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    place, prompt = np.divmod(codes, n_prompts)
    position, side = np.divmod(place, 2)
    both = [set(prompt[side == s].tolist()) for s in (0, 1)]
    if control == "none" or not all(both):
        if min(map(len, both)) < 2:
            raise InputError(
                f"{sides.named(0)} cannot be compared with {sides.named(1)}: {len(both[0])} and {len(both[1])} "
                "prompts, and "
                "at least 2 are needed"
            )
        return np.zeros(longest, dtype=np.int64)
    out = np.full(longest, -1)
    first, number = 0, 0
    standing: list[set[int]] = [set(), set()]
    order = np.searchsorted(position, np.arange(longest + 1))
    for here in range(longest):
        if not standing[0] and not standing[1]:
            first = here
        for p, s in zip(prompt[order[here] : order[here + 1]], side[order[here] : order[here + 1]], strict=True):
            standing[s].add(int(p))
        if min(map(len, standing)) >= LEAST_PROMPTS:
            out[first : here + 1] = number
            number += 1
            standing = [set(), set()]
        elif here + 1 - first >= SLACK and (here + 2) > WIDEST * (first + 1):
            standing = [set(), set()]  # too wide before it was full: its positions take no part
    return out


def words(result: xr.Dataset) -> str:
    """The comparison in plain words, with and without the control; nothing whose interval includes zero differs."""
    lines = []
    for control in CONTROLS:
        cell = result.sel(control=control)
        label = "All tokens" if control == "none" else "At equal position"
        if not cell["prompts"]:
            lines.append(f"{label}: too few prompts stand on both sides at like positions.")
            continue
        rests = f"{int(cell['prompts'])} prompts, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
        different = cell["different"].values
        if not cell["difference"].dims:
            said = "differs" if different else "no difference shown"
            lines.append(f"{label} ({rests}): {said}, {_with_interval(cell)}.")
            continue
        lines.append(f"{label} ({rests}): {different.sum()} of {different.size} cells differ.")
        ranked = np.argsort(-np.where(different, np.abs(cell["difference"].values), -np.inf), axis=None)
        for place in ranked[: min(3, int(different.sum()))]:
            layer, column = np.unravel_index(place, different.shape)
            one = cell.isel({d: int(i) for d, i in zip(cell["difference"].dims, (layer, column), strict=True)})
            kind = cell["difference"].dims[1]
            lines.append(f"  layer {int(one['layer'])} {kind} {int(one[str(kind)])}: {_with_interval(one)}")
    naive, matched = (result["different"].sel(control=c).values for c in CONTROLS)
    if naive.size > 1 and naive.any() and result["prompts"].sel(control="position"):
        kept = int(
            (naive & matched & (np.sign(result["difference"][0]) == np.sign(result["difference"][1])).values).sum()
        )
        lines.append(f"Of {int(naive.sum())} differences over all tokens, {kept} remain at equal position.")
    return "\n".join(lines)


def _with_interval(cell: xr.Dataset) -> str:
    numbers = [float(cell[name]) for name in ("mean_a", "mean_b", "difference", "low", "high")]
    return "{:.3f} against {:.3f}, difference {:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers)
