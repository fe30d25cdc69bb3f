"""The risk difference study: how much more often is an expert selected at tokens with one label than with another?

SteerMoE's risk difference of an expert is the fraction of the tokens on side a that select it, less that on side b.
The sides are any two token selections: channels, roles, parts, efforts, tasks, right and wrong answers.

The pooled difference also contains everything else that differs between the sides. It is therefore computed within
strata as well: within prompts, within token ids, and within both. A stratum with n_a and n_b tokens has the weight
n_a n_b / (n_a + n_b) (Mantel–Haenszel); one stratum for all tokens is SteerMoE's definition.

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
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.registry import Study
from workbench.studies.contrast import paired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.matching import Block, TokenRun, duplicates_warning, index_of
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.token_labels import TOKEN_LABELS, Selection, mask, selection_of

STUDY = Study(
    name="risk-difference",
    title="Risk difference of experts",
    question="Which experts are selected more often at tokens with one label than at tokens with another?",
    requires=("routing",),
    compute="two passes over the run's tokens; jackknife over groups of prompts",
    options={
        "a": "Tokens of side a, as channel=final or role=user,part=content (default: channel=final).",
        "b": "Tokens of side b (default: channel=analysis).",
    },
    figures="workbench.figures.risk_difference",
    page="experts",
    page_title="Experts",
    order=45,
)
CONTROLS = ("pooled", "prompt", "token", "prompt and token")
GROUPS = 40  # of prompts; each is left out once
_IDS = 1 << 20  # more than any vocabulary has
_POOLED = "Unpaired, all tokens pooled (the sides may differ by task, effort, words and position)"
_NAMED = 5  # experts of each side that the summary lists
_CI = f"95 %, delete-a-group jackknife over at most {GROUPS} groups of prompts, Student's t corrected for skewness"
DEFINITIONS = {
    "rate_a": Definition("selection rate in a", "1", "fraction of side a's tokens that select the expert"),
    "rate_b": Definition("selection rate in b", "1", "fraction of side b's tokens that select the expert"),
    "difference": Definition("risk difference", "1", "rate in a less rate in b within strata", ci=_CI, null="0"),
    "low": Definition("risk difference, lower limit", "1", "lower limit of difference", ci=_CI),
    "high": Definition("risk difference, upper limit", "1", "upper limit of difference", ci=_CI),
    "p": Definition("p", "1", "two-sided, as the interval; missing: cannot be tested", null="0"),
    "q": Definition("q", "1", "Benjamini–Hochberg over all layers × experts of this control"),
    "different": Definition("differs", "1", "q < 0.05 and the interval excludes zero"),
    "bound": Definition("equivalence bound", "1", "smallest bound within which it is shown to lie (TOST, p < 0.05)"),
    "tokens_a": Definition("tokens in a", "tokens", "tokens of side a in strata that have both sides"),
    "tokens_b": Definition("tokens in b", "tokens", "tokens of side b in strata that have both sides"),
    "prompts": Definition("prompts", "prompts", "prompts with tokens in strata that have both sides"),
}
METHOD = (
    "Risk difference of an expert: the fraction of tokens on side a that select it (among their top k) less that on "
    "side b. 'pooled' is SteerMoE's: all tokens together. 'prompt', 'token' and 'prompt and token' compare tokens of "
    "the same prompt, with the same token id, or both; a stratum weighs n_a n_b / (n_a + n_b). Intervals and tests "
    "leave out one group of prompts at a time, as tokens of a prompt are not independent."
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
    weights = {control: _Weights.of(design, control, groups, n_groups) for control in CONTROLS}
    weights = {control: w for control, w in weights.items() if control in ("pooled", "token") or w.n_prompts}
    rates, left_out = _estimates(design, weights, n_groups)
    tested = [_test(values, w.n_prompts, n_groups) for values, w in zip(left_out, weights.values(), strict=True)]
    cells = ("control", "layer", "expert")
    kept = ("difference", "low", "high", "p", "q", "different", "bound")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (cells, np.stack([np.asarray(one[name]) for one in tested])) for name in kept
    }
    variables |= {f"rate_{side}": (cells[1:], rates[i]) for i, side in enumerate("ab")}
    for i, side in enumerate("ab"):
        variables[f"tokens_{side}"] = (cells[:1], np.array([w.tokens[i] for w in weights.values()]))
    variables["prompts"] = (cells[:1], np.array([w.n_prompts for w in weights.values()]))
    shape = rates.shape[1:]
    names = [_text(side) for side in sides]
    title = f"Risk difference of experts: {names[0]} against {names[1]}"
    attrs = provenance(STUDY.name, title, run.digest, seed, {"a": names[0], "b": names[1]}) | {
        "a": names[0],
        "b": names[1],
        "groups": n_groups,
        "duplicate_prompts": merged,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"control": list(weights), "layer": np.arange(shape[0]), "expert": np.arange(shape[1])}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = _summary(result)
    return {"experts": result}


class _Design:
    """The tokens of both sides, as counts by prompt and token id, and a second pass over them."""

    def __init__(self, run: TokenRun, sides: tuple[Any, Any], prompt: Int[np.ndarray, " sequence"]) -> None:
        self.run, self.sides, self.prompt = run, sides, prompt
        names = [set(side) if isinstance(side, Mapping) else set() for side in sides]
        self._labels = tuple(sorted(set.union(*names) & (TOKEN_LABELS.keys() - {"channel"})))
        parts = [np.zeros((0, 3), dtype=np.int64)]
        for block, side in self.blocks():
            code = self.codes(block)
            for number in (0, 1):
                value, n = np.unique(code[side == number], return_counts=True)
                parts.append(np.stack([value, np.full(len(value), number), n], 1))
        rows = np.concatenate(parts)
        self.code, of = np.unique(rows[:, 0], return_inverse=True)
        counts = [np.bincount(of, rows[:, 2] * (rows[:, 1] == number), len(self.code)) for number in (0, 1)]
        self.counts: Int[np.ndarray, "side code"] = np.stack(counts).astype(np.int64)
        for number, side in enumerate(sides):
            if not self.counts[number].sum():
                raise InputError(f"no token of the run is on side {'ab'[number]}, {_text(side)}: choose other labels")

    def blocks(self, *names: str) -> Iterator[tuple[Block, Int[np.ndarray, " token"]]]:
        """Yield blocks, and the side of each token: 0, 1, or −1 for neither."""
        for block in self.run.blocks("id", *self._labels, *names):
            columns = pd.DataFrame({k: block[k] for k in ("sequence", "position", "channel", "id", *self._labels)})
            on = [mask(side, columns, self.run.sequences) for side in self.sides]
            if (on[0] & on[1]).any():
                raise InputError(f"tokens are on both sides, {_text(self.sides[0])} and {_text(self.sides[1])}")
            yield block, np.where(on[0], 0, np.where(on[1], 1, -1))

    def codes(self, block: Block) -> Int[np.ndarray, " token"]:
        """Return prompt and token id of every token as one number."""
        return np.asarray(self.prompt[block["sequence"]].astype(np.int64) * _IDS + block["id"].astype(np.int64))

    def groups(self, rng: np.random.Generator) -> Int[np.ndarray, " prompt"]:
        """Return the group of every prompt; prompts with the same sides are spread evenly over the groups."""
        owner = self.code // _IDS
        n_prompts = int(self.prompt.max(initial=-1)) + 1
        has = [np.bincount(owner, self.counts[side], n_prompts) > 0 for side in (0, 1)]
        used = np.flatnonzero(has[0] | has[1])
        used = rng.permutation(used)
        used = used[np.argsort(has[0][used] * 2 + has[1][used], kind="stable")]
        group = np.zeros(n_prompts, dtype=np.int64)
        group[used] = np.arange(len(used)) % min(GROUPS, len(used))
        return group


@dataclass(frozen=True)
class _Weights:
    """The weight of a token of each stratum on each side, with all groups of prompts and without each of them.

    Strata within prompts lose all of their tokens or none when a group is left out, so that one share is enough.
    """

    share: Float[np.ndarray, "side stratum config"]  # config 0: all groups; one config for strata within prompts
    total: Float[np.ndarray, " config"]
    stratum: Int[np.ndarray, " code"]
    group: Int[np.ndarray, " code"]
    tokens: tuple[int, int]
    n_prompts: int

    @classmethod
    def of(cls, design: _Design, control: str, groups: Int[np.ndarray, " prompt"], n_groups: int) -> "_Weights":
        """Return the weights of one control."""
        prompt, token = np.divmod(design.code, _IDS)
        keys = {"pooled": np.zeros_like(token), "prompt": prompt, "token": token}
        stratum = np.unique(keys.get(control, design.code), return_inverse=True)[1]
        n_strata, group = int(stratum.max()) + 1, groups[prompt]
        n = np.stack([np.bincount(stratum, design.counts[side], n_strata) for side in (0, 1)])[..., None]
        within = control.startswith("prompt")
        if not within:
            without = np.zeros((2, n_strata, n_groups))
            for side in (0, 1):
                np.add.at(without[side], (stratum, group), design.counts[side])
            n = np.concatenate([n, n - without], axis=2)
        both = n.sum(0)
        matched = np.divide(n[0] * n[1], both, out=np.zeros_like(both), where=both > 0)
        total = matched.sum(0)
        if within:
            owner = np.zeros(n_strata, dtype=np.int64)
            owner[stratum] = group
            without_group = np.bincount(owner, matched[:, 0], n_groups)
            total = np.append(total, np.maximum(total - without_group, 0))
        # a token of side a has n_b / (n_a + n_b), one of side b n_a / (n_a + n_b)
        share = np.divide(n[::-1], both, out=np.zeros_like(n), where=both > 0)
        used = matched[stratum, 0] > 0
        tokens = [int(design.counts[side][used].sum()) for side in (0, 1)]
        return cls(share, total, stratum, group, (tokens[0], tokens[1]), len(np.unique(prompt[used])))

    def of_tokens(
        self, side: Int[np.ndarray, " token"], code: Int[np.ndarray, " token"]
    ) -> Float[np.ndarray, "token config"]:
        """Return the signed weights of tokens, given their places among the codes."""
        share = self.share[side, self.stratum[code]] * np.where(side == 0, 1.0, -1.0)[:, None]
        out = np.divide(share, self.total, out=np.zeros((len(side), len(self.total))), where=self.total > 0)
        out[np.arange(len(side)), 1 + self.group[code]] = 0  # the token's own group is left out there
        return out


def _estimates(
    design: _Design, weights: Mapping[str, _Weights], n_groups: int
) -> tuple[Float[np.ndarray, "side layer expert"], Float[np.ndarray, "control config layer expert"]]:
    """Return the rates of both sides, and every control's differences, with all groups and without each."""
    model = design.run.model
    layers, experts = model["n_layers"], model["num_experts"]
    rates = np.zeros((2, layers, experts))
    found = np.zeros((len(weights), n_groups + 1, layers, experts))
    for block, side in design.blocks("experts"):
        at = np.flatnonzero(side >= 0)
        place = np.searchsorted(design.code, design.codes(block)[at])
        own = side[at]
        token = [w.of_tokens(own, place) for w in weights.values()]
        columns = np.concatenate([np.stack([own == 0, own == 1], 1).astype(np.float64), *token], axis=1)
        for layer, chosen in enumerate(block["experts"]):
            sums = _by_expert(chosen[at], columns, experts)
            rates[:, layer] += sums[:2]
            found[:, :, layer] += sums[2:].reshape(len(weights), n_groups + 1, experts)
    for i, w in enumerate(weights.values()):
        found[i, w.total <= 0] = np.nan
    return rates / design.counts.sum(1)[:, None, None], found


def _by_expert(
    chosen: Int[np.ndarray, "token slot"], columns: Float[np.ndarray, "token column"], n_experts: int
) -> Float[np.ndarray, "column expert"]:
    """Return the sums of the columns over the tokens that select each expert."""
    n, k = chosen.shape
    parts = (np.ones(n * k), chosen.ravel().astype(np.int64), np.arange(0, n * k + 1, k))
    return np.asarray((scipy.sparse.csr_array(parts, shape=(n, n_experts)).T @ columns).T)


def _test(left_out: Float[np.ndarray, "config layer expert"], n_prompts: int, n_groups: int) -> dict[str, Any]:
    """Return the difference with limits, p, q and verdict from its values without each group (pseudo-values)."""
    whole, without = left_out[0], left_out[1:]
    if n_prompts < MIN_PROMPTS or not np.isfinite(left_out).all():
        missing = np.full(whole.shape, np.nan)
        return {n: missing for n in ("low", "high", "p", "q", "bound")} | {
            "difference": whole,
            "different": np.zeros(whole.shape, dtype=bool),
        }
    # Tukey's pseudo-values: the standard error of their mean is that of the jackknife
    return paired_test(whole - (n_groups - 1) * (without - without.mean(0)))


def _text(side: Any) -> str:
    """Return a selection as it is written on the command line."""
    if not isinstance(side, Mapping):
        return str(side)
    values = {k: [v] if isinstance(v, str | int | bool) else list(v) for k, v in side.items()}
    return ",".join(f"{name}={'|'.join(map(str, wanted))}" for name, wanted in values.items())


def strictest(result: xr.Dataset) -> str:
    """Return the control that matches most and can be tested; "pooled" if none can."""
    for control in reversed([str(c) for c in result["control"].values]):
        if np.isfinite(result["p"].sel(control=control)).any():
            return control
    return "pooled"


def _summary(result: xr.Dataset) -> str:
    """Return the counts of each control, and the experts that differ most under the strictest one."""
    lines = []
    if warning := duplicates_warning(int(result.attrs["duplicate_prompts"])):
        lines.append(warning)
    for control in map(str, result["control"].values):
        cell = result.sel(control=control)
        n = int(cell["prompts"])
        rests = f"{n} prompts, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
        label = _POOLED if control == "pooled" else f"Within {control}"
        if not np.isfinite(cell["p"]).any():
            lines.append(f"{label} ({rests}): cannot be tested, at least {MIN_PROMPTS} prompts are needed.")
            continue
        large = [int((cell["different"] & (np.abs(cell["difference"]) > size)).sum()) for size in (0, 0.1, 0.3)]
        lines.append(
            f"{label} ({rests}): {large[0]} of {cell['different'].size} experts differ, {large[1]} by more than 10 and "
            f"{large[2]} by more than 30 percentage points."
        )
        lines += [f"  Warning: {text}." for text in (few_prompts(n),) if text]
    control = strictest(result)
    cell = result.sel(control=control)
    for sign, side in ((1, "a"), (-1, "b")):
        size = np.where(cell["different"], sign * cell["difference"], -np.inf)
        order = np.argsort(-size, axis=None)[:_NAMED]
        lines += [
            _line(cell.isel(layer=int(layer), expert=int(expert)), result.attrs[side])
            for layer, expert in zip(*np.unravel_index(order, size.shape), strict=True)
            if size[layer, expert] > 0
        ]
    matched = "" if control == "pooled" else f" within {control}"
    return "\n".join([*lines, f"Experts are listed by their difference{matched}; both rates are of all tokens."])


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
