"""Comparisons of what tokens have (experts, sinks, predictions), within prompts, with intervals over prompts.

Differences are taken within each prompt (channels and halves: within each sequence), and then averaged over prompts;
`workbench.studies.matching` states how. Prompts weigh alike without a control. With a control, a prompt with m matched
tokens weighs m / (m + 10), so that one with a single matched token counts little and none dominates.

The sampling unit is the prompt; `workbench.studies.difference_tests` computes intervals and tests over prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import scipy.sparse
import xarray as xr
from jaxtyping import Bool, Float

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run
from workbench.runs.schema import Activation
from workbench.studies import token_labels
from workbench.studies.contrast_summary import UNPAIRED, describe
from workbench.studies.difference_tests import paired_influence, tested_cells, weighted_mean
from workbench.studies.intervals import MIN_PROMPTS
from workbench.studies.layer_experts import layer_experts
from workbench.studies.matching import (
    HALF_WEIGHT,
    Between,
    Matching,
    Plan,
    check_plan,
    check_prompts,
    match,
    match_runs,
    sums_by_prompt,
)
from workbench.studies.resampling import LEVEL
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import (
    SLACK,
    WIDEST,
    Block,
    Control,
    RunIndex,
    TokenRun,
    cell_codes,
    index_of,
    reads,
    token_blocks,
)
from workbench.studies.statistics import ALPHA

__all__ = ["Between", "Plan", "contrast", "contrasts", "describe", "run_contrasts", "uncomparable"]

CONTROLS: tuple[Control, ...] = ("none", "position")
_MOST_SUMS = 32_000_000  # numbers of a block's sums at once
_COLUMNS = 512  # of a recorded activation, summed at once in float64
_KNOWN = ("experts", "sink", "entropy", "logprob")

_CI = f"{LEVEL:.0%}, delete-one jackknife over prompts, Student's t corrected for skewness"
DEFINITIONS = {
    "mean_a": Definition("mean in a", "1", "mean over prompts of the mean in each prompt; adjusted to b under control"),
    "mean_b": Definition("mean in b", "1", "mean over prompts of the mean in each prompt"),
    "difference": Definition("difference", "1", "mean over prompts of a − b within each prompt", ci=_CI),
    "low": Definition("difference, lower limit", "1", "lower limit of difference", ci=_CI),
    "high": Definition("difference, upper limit", "1", "upper limit of difference", ci=_CI),
    "p": Definition("p", "1", "two-sided, as the interval; missing: cannot be tested", null="no difference"),
    "q": Definition("q", "1", "Benjamini–Hochberg over all cells of this comparison and control"),
    "different": Definition("differs", "1", f"q < {ALPHA} and the interval excludes zero"),
    "bound": Definition(
        "equivalence bound", "1", "smallest bound within which the difference is shown to lie (TOST, p < 0.05)"
    ),
    "size": Definition("size by layer", "1", "root of the summed squares of the difference over the layer's cells"),
    "noise": Definition("size that noise alone has", "1", "root of the summed squared standard errors of the layer"),
    "tokens_a": Definition("tokens of a", "tokens", "tokens that take part"),
    "tokens_b": Definition("tokens of b", "tokens", "tokens that take part"),
    "prompts": Definition("prompts", "prompts", "prompts that take part"),
    "strata": Definition("strata", "strata", "strata (of position or token id) that take part; 1 without a control"),
    "prompts_excluded": Definition("prompts excluded", "prompts", "prompts with one side that cannot be paired"),
    "sequences_excluded": Definition("sequences excluded", "sequences", "sequences on a side that cannot be paired"),
    "tokens_excluded": Definition("tokens excluded", "tokens", "tokens on a side that cannot be paired"),
}
METHOD = (
    "Differences are taken within each prompt that has both sides and averaged over prompts with equal weight; the "
    "rest is excluded and counted. Channels and halves: within each sequence. Efforts: between the means of a prompt's "
    f"sequences. Control 'position': efforts within strata of at most {SLACK} positions or {WIDEST - 1:.0%}; channels "
    "and halves by a least-squares fit in each prompt on side, sequence and stratum. Control 'token': within the same "
    f"token id. With a control, a prompt with m matched tokens weighs m / (m + {HALF_WEIGHT}). The sampling unit is "
    "the prompt (jackknife, Student's t corrected for skewness). A cell is called different only if q < 0.05 "
    "(Benjamini–Hochberg) and its interval excludes zero."
)
NOT_CONTROLLED = "Words are not matched (but by the control 'token'), and what comes before a token is not."


@dataclass(frozen=True)
class Measure:
    """What is compared: its sums over groups of a block's tokens."""

    title: str
    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    sums: Callable[[Block, np.ndarray, np.ndarray, int], np.ndarray]
    exists: Bool[np.ndarray, " *cells"] = field(default_factory=lambda: np.array(True))  # False: no such expert
    layers: tuple[int, ...] = ()  # of an activation that not all layers have

    @property
    def finite(self) -> str:
        """Return the quantity that some tokens lack, such as a first token's prediction; empty if none does."""
        return "" if self.dims else self.name


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
    controls: Sequence[Control] = CONTROLS,
    unpaired: bool = False,
) -> xr.Dataset:
    """Return the difference of `what` (experts, sink, entropy, logprob) between a and b within prompts.

    between channels: a and b are channels. Efforts and tasks: those of `channel`'s tokens. Halves: `first` and
    `second` of `channel`'s tokens in each sequence. effort, task: hold these fixed. unpaired: also take prompts that
    have one side alone (always so between tasks), and state it. Dimensions: control, and what a token has: (layer,
    expert), (layer, head) or none.

    Raises:
        InputError: a label is not in the run, or fewer than 5 prompts have both sides.
    """
    plan = Plan(between, a, b, channel, effort, task, unpaired)
    check_plan(run, plan)
    results, refused = contrasts(run, what, {"": plan}, study=study, seed=seed, controls=controls)
    if refused:
        raise InputError(refused[""])
    return results[""]


def contrasts(
    run: TokenRun,
    what: str,
    plans: Mapping[str, Plan],
    *,
    study: str = "contrast",
    seed: int = 0,
    controls: Sequence[Control] = CONTROLS,
) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """Return the comparisons of one quantity by name, all from one pass over the tokens, and why others have none."""
    measure, index = _measure(run, what), index_of(run)
    refused = uncomparable(run, what, plans)
    matchings = {
        (name, control): match(index, plan, control, measure.finite)
        for name, plan in plans.items()
        if name not in refused
        for control in controls
    }
    sums = _prompt_sums(index, measure, matchings)
    results = {}
    for name, plan in plans.items():
        if name not in refused:
            tested = [_test(measure, plan, matchings[name, c], sums[name, c]) for c in controls]
            results[name] = _result(run, measure, plan, controls, tested, study, seed)
    return results, refused


def run_contrasts(
    run: TokenRun, other: TokenRun, what: str, *, study: str = "compare", seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the difference of `what` between the same tokens of two runs (a: run, b: other), by channel.

    what: as in `contrast`, or an activation that both recorded at all tokens.

    Raises:
        InputError: a run did not record the quantity, or the runs differ in its dimensions or in their tokens.
    """
    measure, theirs_measure = (_measure(r, what) if what in _KNOWN else _recorded(r, what) for r in (run, other))
    index, second = index_of(run), index_of(other)
    if (measure.shape, measure.layers) != (theirs_measure.shape, theirs_measure.layers):
        raise InputError(
            f"{what} has {measure.shape} cells in run a and {theirs_measure.shape} in run b: they do not correspond"
        )
    cells, theirs = (i.cells("position", measure.finite) for i in (index, second))
    if not all(np.array_equal(getattr(cells, name), getattr(theirs, name)) for name in ("code", "tokens")):
        raise InputError(f"the runs have {what} of different tokens: capture the same transcripts with both")
    present = [name for code, name in enumerate(CHANNELS) if (cells.channel == code).any()]
    weights: dict[tuple[str, Control], Matching] = {
        (name, "none"): match_runs(index, name, measure.finite) for name in present
    }
    of_a, of_b = (_prompt_sums(i, measure, weights) for i in (index, second))
    results = {}
    for name in present:
        key: tuple[str, Control] = (name, "none")
        plan, mean_a, mean_b = Plan("run", "a", "b", name), of_a[key][0], of_b[key][0]
        tested = _test(measure, plan, weights[key], (mean_a - mean_b, mean_a, mean_b))
        results[name] = _result(run, measure, plan, ("none",), [tested], study, seed)
    return results


def uncomparable(run: TokenRun, what: str, plans: Mapping[str, Plan]) -> dict[str, str]:
    """Return, by name, why comparisons cannot be made: unknown labels or too few prompts with both sides."""
    measure, index = _measure(run, what), index_of(run)
    refused: dict[str, str] = {}
    for name, plan in plans.items():
        try:
            check_plan(run, plan)
            check_prompts(plan, match(index, plan, "none", measure.finite))
        except InputError as error:
            refused[name] = str(error)
    return refused


def _dense(what: str, block: Block, at: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
    """Return sums of values [token] or [layer, token, column] over groups: [group] or [group, layer, column]."""
    values = block[what]
    if values.ndim == 1:
        return np.bincount(group, values[at].astype(np.float64), n)
    take = scipy.sparse.csr_array((np.ones(len(at)), (group, at)), shape=(n, values.shape[1]))
    return np.stack([np.asarray(take @ layer.astype(np.float64)) for layer in values], axis=1)


def _recorded(run: TokenRun, hook: str) -> Measure:
    """Return the measure of an activation that a run recorded at all tokens, by layer and feature."""
    if not hasattr(run, "spec"):
        raise InputError(f"{hook!r} cannot be compared: a run holds no recorded activations")
    about = token_labels.recorded(cast(Run, run), hook)
    if about.sparse:
        raise InputError(f"{about.name} was recorded at some tokens only: record it without options to compare it")
    width = about.d if isinstance(about, Activation) else int(np.prod(about.shape))

    def flat(block: Block, at: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
        values = block[about.name].reshape(len(about.layers), len(block["sequence"]), width)
        columns = range(0, width, _COLUMNS)
        return np.concatenate(
            [_dense("part", {"part": values[..., c : c + _COLUMNS]}, at, group, n) for c in columns], axis=-1
        )

    return Measure(
        f"Activation {about.name}",
        about.name,
        ("layer", "feature"),
        (len(about.layers), width),
        flat,
        layers=about.layers,
    )


def _measure(run: TokenRun, what: str) -> Measure:
    model = run.model
    layers, experts, heads, k = (model[n] for n in ("n_layers", "num_experts", "n_heads", "experts_per_token"))

    def chosen(block: Block, at: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
        out = np.empty((n, layers, experts))
        start = group[:, None] * experts
        for layer, selected in enumerate(block["experts"]):
            counted = np.bincount((start + selected[at]).ravel(), minlength=n * experts)
            out[:, layer] = counted.reshape(n, experts) / k
        return out

    exists = np.arange(experts) < layer_experts(run, layers, experts)[:, None]
    known = {
        "experts": Measure("Expert load", what, ("layer", "expert"), (layers, experts), chosen, exists),
        "sink": Measure("Sink attention", what, ("layer", "head"), (layers, heads), partial(_dense, what)),
        "entropy": Measure("Entropy of the prediction, nat", what, (), (), partial(_dense, what)),
        "logprob": Measure("Log-probability of the token, nat", what, (), (), partial(_dense, what)),
    }
    if what not in known:
        raise InputError(f"what={what!r} is unknown; choose from {', '.join(_KNOWN)}")
    return known[what]


Sums = tuple[Float[np.ndarray, "prompt *cells"], Float[np.ndarray, "prompt *cells"], Float[np.ndarray, "prompt *cells"]]


def _prompt_sums(
    index: RunIndex, measure: Measure, matchings: Mapping[tuple[str, Control], Matching]
) -> dict[tuple[str, Control], Sums]:
    """Return every prompt's difference, mean of side a and mean of side b, in each comparison."""
    sums_of: dict[tuple[str, Control], Sums] = {}
    for kind in ("position", "token"):
        own = {key: m for key, m in matchings.items() if (key[1] == "token") == (kind == "token")}
        if not own:
            continue
        n_prompts = int(index.prompts[0].max(initial=-1)) + 1
        for key in own:
            difference, side_a, side_b = (np.zeros((n_prompts, *measure.shape)) for _ in range(3))
            sums_of[key] = (difference, side_a, side_b)
        used = np.logical_or.reduce([(m.side_a != 0) | (m.side_b != 0) | (m.difference != 0) for m in own.values()])
        for at, sums in _cell_sums(index, measure, kind, used):
            for key, m in own.items():
                weights = np.stack([m.difference[at], m.side_a[at], m.side_b[at]])
                for total, (present, of_prompts) in zip(
                    sums_of[key], sums_by_prompt(weights, m.prompt[at], sums.reshape(len(at), -1)), strict=True
                ):
                    total[present] += of_prompts.reshape(-1, *measure.shape)
    return sums_of


def _cell_sums(
    index: RunIndex, measure: Measure, kind: Control, used: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield cell numbers [local] and sums [local, …] over the tokens of the cells that are used, some at a time."""
    cells = index.cells(kind, measure.finite)
    if not used.any():
        return
    names = dict.fromkeys((*reads(kind, measure.finite), measure.name))
    most = max(1, _MOST_SUMS // max(1, int(np.prod(measure.shape))))
    for block in token_blocks(index.run, f"compare {measure.name}", *names):
        code, known = cell_codes(block, kind, measure.finite)
        cell = np.minimum(np.searchsorted(cells.code, code), len(cells.code) - 1)
        at = np.flatnonzero(known & used[cell])
        numbers, group = np.unique(cell[at], return_inverse=True)
        for start in range(0, len(numbers), most):
            inside = (group >= start) & (group < start + most)
            local = numbers[start : start + most]
            yield local, measure.sums(block, at[inside], group[inside] - start, len(local))


def _test(measure: Measure, plan: Plan, matching: Matching, sums: Sums) -> dict[str, Any]:
    """Difference, interval and verdict of every cell, and what takes part."""
    difference, side_a, side_b = (np.where(measure.exists, values, np.nan) for values in sums)
    if plan.paired:
        used = matching.prompt_weight > 0
        n = int(used.sum())
        weight = matching.prompt_weight[used]
        means = [weighted_mean(v[used], weight) for v in (difference, side_a, side_b)]
        influence, freedom = paired_influence(difference[used], weight)
    else:
        used = matching.in_a | matching.in_b
        n = min(int(matching.in_a.sum()), int(matching.in_b.sum())) if used.any() else 0
        mean_a, mean_b = (
            weighted_mean(v[present], np.ones(int(present.sum())))
            for v, present in ((side_a, matching.in_a), (side_b, matching.in_b))
        )
        means = [mean_a - mean_b, mean_a, mean_b]
        influence = np.zeros_like(side_a)
        for sign, v, present, mean in ((1, side_a, matching.in_a, mean_a), (-1, side_b, matching.in_b, mean_b)):
            m = int(present.sum())
            scale = 1 / np.sqrt(m * (m - 1)) if m > 1 else np.nan
            influence[present] += sign * scale * (v[present] - mean)
        freedom = n - 1.0
    tested = tested_cells(np.asarray(means[0]), influence, freedom, n >= MIN_PROMPTS)
    return tested | {
        "mean_a": means[1],
        "mean_b": means[2],
        "tokens_a": matching.tokens[0],
        "tokens_b": matching.tokens[1],
        "prompts": int(used.sum()),
        "strata": matching.strata,
        "prompts_excluded": matching.excluded[0],
        "sequences_excluded": matching.excluded[1],
        "tokens_excluded": matching.excluded[2],
    }


def _result(
    run: TokenRun,
    measure: Measure,
    plan: Plan,
    controls: Sequence[Control],
    tested: Sequence[Mapping[str, Any]],
    study: str,
    seed: int,
) -> xr.Dataset:
    """Return the comparison as a dataset, with its summary."""
    cells = ("control", *measure.dims)
    layers = {"size", "noise"}
    of_cells = {"mean_a", "mean_b", "difference", "low", "high", "p", "q", "different", "bound"}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in (n for n in DEFINITIONS if n in tested[0]):
        dims = cells if name in of_cells else cells[:2] if name in layers else cells[:1]
        variables[name] = (dims, np.stack([np.asarray(one[name]) for one in tested]))
    duplicates = index_of(run).prompts[1]
    title = f"{measure.title}: {plan.label(0)} against {plan.label(1)}"
    parameters = {"what": measure.name, **plan._asdict(), "controls": list(controls)}
    attrs = provenance(study, title, run.digest, seed, parameters) | {
        "between": plan.between,
        "a": plan.label(0),
        "b": plan.label(1),
        "what": measure.name,
        "paired": int(plan.paired),
        "duplicate_prompts": duplicates,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED if plan.paired else f"{UNPAIRED} {NOT_CONTROLLED}",
    }
    coords = {"control": list(controls)} | {d: np.arange(n) for d, n in zip(measure.dims, measure.shape, strict=True)}
    if measure.layers:
        coords["layer"] = np.array(measure.layers)
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = describe(result)
    return result
