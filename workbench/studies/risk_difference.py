"""The risk difference study: how much more often is an expert selected at tokens with one label than with another?

SteerMoE's risk difference of an expert is the fraction of the tokens on side a that select it, less that on side b.
The sides are any two token selections: channels, roles, parts, efforts, tasks, right and wrong answers.

By default differences are taken within prompts, by the engine of all studies (`workbench.studies.matching`): between
two channels the result is k times the difference of the share of routed slots in the study `routing`. Under the control
"prompt and token" they are taken at the same token ids as well. "pooled" is SteerMoE's definition: it compares all
tokens and so contains everything else that differs between the sides. "token" matches token ids alone; there, an id
with n_a and n_b tokens has the weight n_a n_b / (n_a + n_b) (Mantel–Haenszel).

    found = study(wb.open_run("run.zarr"), a="channel=final", b="channel=analysis")["experts"]

Reference: SteerMoE, arXiv 2509.09660; Mantel & Haenszel 1959; Shao & Tu 1995, The Jackknife and Bootstrap.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.errors import InputError
from workbench.registry import Study
from workbench.studies.contrast import paired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.matching import (
    Block,
    Cells,
    Control,
    Matching,
    TokenRun,
    duplicates_warning,
    index_of,
    match_cells,
    token_blocks,
)
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.token_labels import TOKEN_LABELS, Selection, mask, selection_of

STUDY = Study(
    name="risk-difference",
    title="Risk difference of experts",
    question="Which experts are selected more often at tokens with one label than at tokens with another?",
    requires=("routing",),
    compute="two passes over the run's tokens; jackknife over prompts",
    options={
        "a": "Tokens of side a, as channel=final or role=user,part=content (default: channel=final).",
        "b": "Tokens of side b (default: channel=analysis).",
    },
    figures="workbench.figures.risk_difference",
    page="experts",
    page_title="Experts",
    order=45,
)
MATCHED: dict[str, Control] = {"prompt": "none", "prompt and token": "token"}  # the engine's control of each
CONTROLS = (*MATCHED, "pooled", "token")
GROUPS = 20  # of prompts; each is left out once, where prompts are not matched
_IDS = 1 << 20  # more than any vocabulary has
_LABELS = {
    "prompt": "Within prompts",
    "prompt and token": "Within prompts, at the same token ids",
    "pooled": "Unpaired, all tokens pooled (the sides may differ by task, effort, words and position)",
    "token": "Unpaired, at the same token ids (the sides may differ by task, effort and position)",
}
_NAMED = 5  # experts of each side that the summary lists
_CI = (
    "95 %, Student's t over prompts corrected for skewness; unpaired: delete-a-group jackknife over at most "
    f"{GROUPS} groups of prompts"
)
DEFINITIONS = {
    "rate_a": Definition("selection rate in a", "1", "fraction of side a's tokens that select the expert"),
    "rate_b": Definition("selection rate in b", "1", "fraction of side b's tokens that select the expert"),
    "difference": Definition(
        "risk difference", "1", "rate in a less rate in b, matched as the control says", ci=_CI, null="0"
    ),
    "low": Definition("risk difference, lower limit", "1", "lower limit of difference", ci=_CI),
    "high": Definition("risk difference, upper limit", "1", "upper limit of difference", ci=_CI),
    "p": Definition("p", "1", "two-sided, as the interval; missing: cannot be tested", null="0"),
    "q": Definition("q", "1", "Benjamini–Hochberg over all layers × experts of this control"),
    "different": Definition("differs", "1", "q < 0.05 and the interval excludes zero"),
    "bound": Definition("equivalence bound", "1", "smallest bound within which it is shown to lie (TOST, p < 0.05)"),
    "tokens_a": Definition("tokens in a", "tokens", "tokens of side a that take part"),
    "tokens_b": Definition("tokens in b", "tokens", "tokens of side b that take part"),
    "prompts": Definition("prompts", "prompts", "prompts that take part; unpaired: of the side with fewer"),
    "prompts_excluded": Definition("prompts excluded", "prompts", "prompts with one side that cannot be paired"),
    "tokens_excluded": Definition("tokens excluded", "tokens", "tokens on a side that cannot be paired"),
}
METHOD = (
    "Risk difference of an expert: the fraction of tokens on side a that select it (among their top k) less that on "
    "side b. 'prompt': within each sequence that has both sides or, where none has, between the means of a prompt's "
    "sequences; averaged over prompts with equal weight. 'prompt and token': the same at equal token ids; a prompt "
    "with m matched tokens weighs m / (m + 10). 'pooled' is SteerMoE's, all tokens together, and 'token' compares "
    "tokens with the same id of any prompt: both are unpaired. Their intervals leave out one group of prompts at a "
    "time, as tokens of a prompt are not independent."
)
NOT_CONTROLLED = (
    "Position, and what comes before a token, are not matched; 'pooled' matches nothing, so that words alone may cause "
    "its differences. A difference is an association: whether an expert causes a behaviour needs an intervention."
)


def study(
    run: TokenRun, *, a: Selection = "channel=final", b: Selection = "channel=analysis", seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the risk difference of every expert between two token selections, by control.

    a, b: labels as text ("channel=final,effort=high", "task=product|chain") or as a mapping, or a token set. seed: of
    the groups of prompts.

    Raises:
        InputError: the run holds no tokens, a label is unknown, a side has no token, or the sides share tokens.
    """
    if not isinstance(run, TokenRun):
        raise InputError("the risk difference needs the tokens of a run, and this one holds sums only")
    sides = (selection_of(a), selection_of(b))
    prompt, merged = index_of(run).prompts
    design = _Design(run, sides, prompt)
    groups = design.groups(np.random.default_rng(seed))
    n_groups = int(groups.max()) + 1
    weights = _Weights.of(design, groups, n_groups)
    matchings = {name: design.matching(control) for name, control in MATCHED.items()}
    matchings = {name: m for name, m in matchings.items() if (m.prompt_weight > 0).any()}
    rates, by_prompt, pooled, same_ids = _estimates(design, matchings, weights, groups)
    n_prompts = min(int(present.sum()) for present in design.prompts_of_sides())
    tested = {name: _test_matched(by_prompt[name], m) for name, m in matchings.items()}
    tested["pooled"] = _test(pooled, n_prompts, (int(design.counts[0].sum()), int(design.counts[1].sum())))
    tested["token"] = _test(same_ids, n_prompts, weights.tokens)
    cells = ("control", "layer", "expert")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in (n for n in DEFINITIONS if n not in ("rate_a", "rate_b")):
        values = np.stack([np.asarray(one[name]) for one in tested.values()])
        variables[name] = (cells[: values.ndim], values)
    variables |= {f"rate_{side}": (cells[1:], rates[i]) for i, side in enumerate("ab")}
    shape = rates.shape[1:]
    names = [_text(side) for side in sides]
    title = f"Risk difference of experts: {names[0]} against {names[1]}"
    attrs = provenance(STUDY.name, title, run.digest, seed, {"a": names[0], "b": names[1]}) | {
        "a": names[0],
        "b": names[1],
        "experts_per_token": int(run.model["experts_per_token"]),
        "groups": n_groups,
        "duplicate_prompts": merged,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"control": list(tested), "layer": np.arange(shape[0]), "expert": np.arange(shape[1])}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = _summary(result)
    return {"experts": result}


class _Design:
    """The tokens of both sides, as counts by sequence and token id, and a second pass over them."""

    def __init__(self, run: TokenRun, sides: tuple[Any, Any], number: Int[np.ndarray, " sequence"]) -> None:
        self.run, self.sides, self.number = run, sides, number
        names = [set(side) if isinstance(side, Mapping) else set() for side in sides]
        self._labels = tuple(sorted(set.union(*names) & (TOKEN_LABELS.keys() - {"channel"})))
        parts = [np.zeros((0, 3), dtype=np.int64)]
        for block, side in self.blocks():
            code = self.codes(block)
            for place in (0, 1):
                value, n = np.unique(code[side == place], return_counts=True)
                parts.append(np.stack([value, np.full(len(value), place), n], 1))
        rows = np.concatenate(parts)
        self.code, of = np.unique(rows[:, 0], return_inverse=True)
        counts = [np.bincount(of, rows[:, 2] * (rows[:, 1] == place), len(self.code)) for place in (0, 1)]
        self.counts: Int[np.ndarray, "side code"] = np.stack(counts).astype(np.int64)
        self.sequence, self.token = np.divmod(self.code, _IDS)
        self.prompt = number[self.sequence]
        for place, side in enumerate(sides):
            if not self.counts[place].sum():
                raise InputError(f"no token of the run is on side {'ab'[place]}, {_text(side)}: choose other labels")

    def matching(self, control: Control) -> Matching:
        """Return the weights within prompts of the cells, those of side a before those of side b."""
        n = len(self.code)
        side, none = np.repeat([0, 1], n), np.zeros(2 * n, dtype=np.int64)
        twice = [np.tile(values, 2) for values in (self.code, self.sequence, self.token)]
        tokens = self.counts.ravel()
        cells = Cells(twice[0], twice[1], none, side, twice[2], tokens)
        has = [np.bincount(self.sequence, self.counts[place], int(self.sequence.max()) + 1) > 0 for place in (0, 1)]
        within = bool((has[0] & has[1]).any())
        return match_cells(cells, np.where(tokens > 0, side, -1), self.number, control, within_sequence=within)

    def blocks(self, *names: str) -> Iterator[tuple[Block, Int[np.ndarray, " token"]]]:
        """Yield blocks, and the side of each token: 0, 1, or −1 for neither."""
        for block in token_blocks(self.run, "risk difference", "id", *self._labels, *names):
            columns = pd.DataFrame({k: block[k] for k in ("sequence", "position", "channel", "id", *self._labels)})
            on = [mask(side, columns, self.run.sequences) for side in self.sides]
            if (on[0] & on[1]).any():
                raise InputError(f"tokens are on both sides, {_text(self.sides[0])} and {_text(self.sides[1])}")
            yield block, np.where(on[0], 0, np.where(on[1], 1, -1))

    def codes(self, block: Block) -> Int[np.ndarray, " token"]:
        """Return sequence and token id of every token as one number."""
        return np.asarray(block["sequence"].astype(np.int64) * _IDS + block["id"].astype(np.int64))

    def groups(self, rng: np.random.Generator) -> Int[np.ndarray, " prompt"]:
        """Return the group of every prompt; prompts with the same sides are spread evenly over the groups."""
        n_prompts = int(self.number.max(initial=-1)) + 1
        has = self.prompts_of_sides()
        used = np.flatnonzero(has[0] | has[1])
        used = rng.permutation(used)
        used = used[np.argsort(has[0][used] * 2 + has[1][used], kind="stable")]
        group = np.zeros(n_prompts, dtype=np.int64)
        group[used] = np.arange(len(used)) % min(GROUPS, len(used))
        return group

    def prompts_of_sides(self) -> list[Bool[np.ndarray, " prompt"]]:
        """Return which prompts have tokens on either side."""
        n_prompts = int(self.number.max(initial=-1)) + 1
        return [np.bincount(self.prompt, self.counts[place], n_prompts) > 0 for place in (0, 1)]


@dataclass(frozen=True)
class _Weights:
    """The weight of a token of each token id on each side, with all groups of prompts and without each of them."""

    share: Float[np.ndarray, "side id config"]  # config 0: all groups
    total: Float[np.ndarray, " config"]
    place: Int[np.ndarray, " code"]  # of the code's token id in `share`
    group: Int[np.ndarray, " code"]
    tokens: tuple[int, int]

    @classmethod
    def of(cls, design: _Design, groups: Int[np.ndarray, " prompt"], n_groups: int) -> "_Weights":
        """Return the weights; groups: of every prompt."""
        place = np.unique(design.token, return_inverse=True)[1]
        n_ids, group = int(place.max()) + 1, groups[design.prompt]
        own = [
            np.bincount(place * n_groups + group, design.counts[side], n_ids * n_groups).reshape(n_ids, n_groups)
            for side in (0, 1)
        ]
        n = np.stack([np.concatenate([c.sum(1)[:, None], c.sum(1)[:, None] - c], axis=1) for c in own])
        both = n.sum(0)
        matched = np.divide(n[0] * n[1], both, out=np.zeros_like(both), where=both > 0)
        # a token of side a has n_b / (n_a + n_b), one of side b n_a / (n_a + n_b)
        share = np.divide(n[::-1], both, out=np.zeros_like(n), where=both > 0)
        used = matched[place, 0] > 0
        tokens = [int(design.counts[side][used].sum()) for side in (0, 1)]
        return cls(share, matched.sum(0), place, group, (tokens[0], tokens[1]))

    def of_tokens(
        self, side: Int[np.ndarray, " token"], code: Int[np.ndarray, " token"]
    ) -> Float[np.ndarray, "token config"]:
        """Return the signed weights of tokens, given their places among the codes."""
        share = self.share[side, self.place[code]] * np.where(side == 0, 1.0, -1.0)[:, None]
        out = np.divide(share, self.total, out=np.zeros(share.shape), where=self.total > 0)
        out[np.arange(len(side)), 1 + self.group[code]] = 0  # the token's own group is left out there
        return out


def _estimates(
    design: _Design, matchings: Mapping[str, Matching], weights: _Weights, groups: Int[np.ndarray, " prompt"]
) -> tuple[
    Float[np.ndarray, "side layer expert"],
    dict[str, Float[np.ndarray, "prompt layer expert"]],
    Float[np.ndarray, "config layer expert"],
    Float[np.ndarray, "config layer expert"],
]:
    """Return both sides' rates, matched differences by prompt, and pooled ones and those at the same token ids.

    The last two with all groups of prompts, and without each.
    """
    model, n_groups, n = design.run.model, len(weights.total) - 1, len(design.code)
    layers, experts = model["n_layers"], model["num_experts"]
    selected = np.zeros((2, n_groups, layers, experts))
    same_ids = np.zeros((n_groups + 1, layers, experts))
    by_prompt = {name: np.zeros((len(groups), layers, experts)) for name in matchings}
    for block, side in design.blocks("experts"):
        at = np.flatnonzero(side >= 0)
        place, own = np.searchsorted(design.code, design.codes(block)[at]), side[at]
        columns, cell = weights.of_tokens(own, place), own * n_groups + weights.group[place]
        present, local = np.unique(design.prompt[place], return_inverse=True)
        matched = [m.difference[own * n + place] for m in matchings.values()]
        for layer, slots in enumerate(block["experts"]):
            chosen = slots[at].astype(np.int64)
            selected[:, :, layer] += _counted(chosen, cell, 2 * n_groups, experts).reshape(2, n_groups, experts)
            same_ids[:, layer] += _by_expert(chosen, columns, experts)
            for found, weight in zip(by_prompt.values(), matched, strict=True):
                found[present, layer] += _counted(chosen, local, len(present), experts, weight)
    same_ids[weights.total <= 0] = np.nan
    tokens = [np.bincount(weights.group, design.counts[side], n_groups) for side in (0, 1)]
    rates = [_with_and_without(of_side, count) for of_side, count in zip(selected, tokens, strict=True)]
    return np.stack([rate[0] for rate in rates]), by_prompt, rates[0] - rates[1], same_ids


def _with_and_without(
    sums: Float[np.ndarray, "group layer expert"], tokens: Float[np.ndarray, " group"]
) -> Float[np.ndarray, "config layer expert"]:
    """Return sums over tokens with all groups, and without each; NaN where no token is left."""
    kept = np.concatenate([sums.sum(0)[None], sums.sum(0) - sums])
    count = np.concatenate([[tokens.sum()], tokens.sum() - tokens])[:, None, None]
    return np.divide(kept, count, out=np.full(kept.shape, np.nan), where=count > 0)


def _counted(
    chosen: Int[np.ndarray, "token slot"],
    row: Int[np.ndarray, " token"],
    n_rows: int,
    n_experts: int,
    weight: Float[np.ndarray, " token"] | None = None,
) -> Float[np.ndarray, "row expert"]:
    """Return the (weighted) number of tokens of each row that select each expert."""
    cell = (row[:, None] * n_experts + chosen).ravel()
    values = None if weight is None else np.repeat(weight, chosen.shape[1])
    return np.bincount(cell, values, n_rows * n_experts).reshape(n_rows, n_experts)


def _by_expert(
    chosen: Int[np.ndarray, "token slot"], columns: Float[np.ndarray, "token column"], n_experts: int
) -> Float[np.ndarray, "column expert"]:
    """Return the sums of the columns over the tokens that select each expert."""
    n, k = chosen.shape
    parts = (np.ones(n * k), chosen.ravel(), np.arange(0, n * k + 1, k))
    return np.asarray((scipy.sparse.csr_array(parts, shape=(n, n_experts)).T @ columns).T)


def _test_matched(by_prompt: Float[np.ndarray, "prompt layer expert"], matching: Matching) -> dict[str, Any]:
    """Return difference, limits, p, q and verdict of a matched control, and what takes part."""
    used = matching.prompt_weight > 0
    return paired_test(by_prompt[used], matching.prompt_weight[used]) | {
        "tokens_a": matching.tokens[0],
        "tokens_b": matching.tokens[1],
        "prompts": int(used.sum()),
        "prompts_excluded": matching.excluded[0],
        "tokens_excluded": matching.excluded[2],
    }


def _test(
    left_out: Float[np.ndarray, "config layer expert"], n_prompts: int, tokens: tuple[int, int]
) -> dict[str, Any]:
    """Return the same of an unpaired control, from its values without each group of prompts (pseudo-values).

    n_prompts: of the side with fewer.
    """
    estimate, without = left_out[0], left_out[1:]
    counted: dict[str, Any] = {"tokens_a": tokens[0], "tokens_b": tokens[1], "prompts": n_prompts}
    counted |= {"prompts_excluded": 0, "tokens_excluded": 0}
    if n_prompts < MIN_PROMPTS or not np.isfinite(left_out).all():
        missing = np.full(estimate.shape, np.nan)
        counted |= {"difference": estimate, "different": np.zeros(estimate.shape, dtype=bool)}
        return counted | dict.fromkeys(("low", "high", "p", "q", "bound"), missing)
    # Tukey's pseudo-values: the standard error of their mean is that of the jackknife
    return counted | paired_test(estimate - (len(without) - 1) * (without - without.mean(0)))


def _text(side: Any) -> str:
    """Return a selection as it is written on the command line."""
    if not isinstance(side, Mapping):
        return str(side)
    values = {k: [v] if isinstance(v, str | int | bool) else list(v) for k, v in side.items()}
    return ",".join(f"{name}={'|'.join(map(str, wanted))}" for name, wanted in values.items())


def strictest(result: xr.Dataset) -> str:
    """Return the control that matches most and can be tested; "pooled" if none can."""
    return _first_tested(result, ("prompt and token", "prompt", "token"))


def default_control(result: xr.Dataset) -> str:
    """Return "prompt" if differences within prompts can be tested, else what matches most."""
    return _first_tested(result, ("prompt", "token"))


def _first_tested(result: xr.Dataset, controls: tuple[str, ...]) -> str:
    known = [c for c in controls if c in result["control"]]
    return next((c for c in known if np.isfinite(result["p"].sel(control=c)).any()), "pooled")


def _summary(result: xr.Dataset) -> str:
    """Return the counts of each control, and the experts that differ most within prompts."""
    lines = []
    if warning := duplicates_warning(int(result.attrs["duplicate_prompts"])):
        lines.append(warning)
    if not set(MATCHED) & set(map(str, result["control"].values)):
        lines.append("No prompt has both sides, so that differences cannot be taken within prompts.")
    for control in map(str, result["control"].values):
        lines += _describe_control(result.sel(control=control), _LABELS[control])
    control = default_control(result)
    cell = result.sel(control=control)
    for sign, side in ((1, "a"), (-1, "b")):
        size = np.where(cell["different"], sign * cell["difference"], -np.inf)
        order = np.argsort(-size, axis=None)[:_NAMED]
        lines += [
            _line(cell.isel(layer=int(layer), expert=int(expert)), result.attrs[side])
            for layer, expert in zip(*np.unravel_index(order, size.shape), strict=True)
            if size[layer, expert] > 0
        ]
    label = _LABELS[control].partition(" (")[0]
    return "\n".join([*lines, f"Experts are listed by their difference {label.lower()}; both rates are of all tokens."])


def _describe_control(cell: xr.Dataset, label: str) -> list[str]:
    n = int(cell["prompts"])
    rests = f"{n} prompts, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
    if left_out := int(cell["tokens_excluded"]):
        rests += f"; excluded, as not paired: {int(cell['prompts_excluded'])} prompts, {left_out:,} tokens"
    if not np.isfinite(cell["p"]).any():
        return [f"{label} ({rests}): cannot be tested, at least {MIN_PROMPTS} prompts are needed."]
    different, size = cell["different"].values, np.abs(cell["difference"].values)
    large = [int((different & (size > least)).sum()) for least in (0, 0.1, 0.3)]
    lines = [
        f"{label} ({rests}): {large[0]} of {different.size} experts differ, {large[1]} by more than 10 and {large[2]} "
        "by more than 30 percentage points."
    ]
    if not different.all():
        largest = float(np.nanmax(np.where(different, np.nan, cell["bound"].values)))
        lines.append(
            f"  In the others, differences beyond ±{100 * largest:.1f} points are excluded (equivalence test)."
        )
    return lines + [f"  Warning: {text}." for text in (few_prompts(n),) if text]


def _line(cell: xr.Dataset, side: str) -> str:
    values = [100 * float(cell[name]) for name in ("difference", "low", "high", "rate_a", "rate_b")]
    return "  layer {} expert {}, more in {}: {:+.1f} points [{:+.1f}, {:+.1f}]; {:.1f} % against {:.1f} %".format(
        int(cell["layer"]), int(cell["expert"]), side, *values
    )


def promoted_and_demoted(
    result: xr.Dataset, n: int = 10, *, control: str | None = None
) -> dict[str, dict[int, list[int]]]:
    """Return SteerMoE's steering map toward side a: at most n experts to promote and to demote, by layer.

    Only experts whose difference is shown (`different`) under the control, by default the strictest that can be tested.
    Use them with `wb.hooks.interventions.force` and `forbid`.

    Raises:
        InputError: the result has no such control.
    """
    control = strictest(result) if control is None else control
    if control not in result["control"]:
        raise InputError(f"control {control!r}: the result has {', '.join(map(str, result['control'].values))}")
    cell = result.sel(control=control)
    found: dict[str, dict[int, list[int]]] = {"promote": {}, "demote": {}}
    for name, sign in (("promote", 1), ("demote", -1)):
        size = np.where(cell["different"], sign * cell["difference"], -np.inf)
        for place in np.argsort(-size, axis=None)[:n]:
            layer, expert = np.unravel_index(place, size.shape)
            if size[layer, expert] > 0:
                found[name].setdefault(int(layer), []).append(int(expert))
    return found
