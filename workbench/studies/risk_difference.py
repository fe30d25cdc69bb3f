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

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.registry import Study
from workbench.studies.difference_tests import paired_test, weighted_mean
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.matching import Matching
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import Control, TokenRun, duplicates_warning, index_of
from workbench.studies.selection_rates import GROUPS, TokenIdWeights, TokenSides, selection_rates
from workbench.studies.token_labels import Selection, selection_of, selection_text
from workbench.studies.wording import wording

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
    order=45,
)
MATCHED: dict[str, Control] = {"prompt": "none", "prompt and token": "token"}  # the engine's control of each
CONTROLS = (*MATCHED, "pooled", "token")
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
    "mean_a": Definition("matched rate in a", "1", "mean over prompts of side a's rate; adjusted to b under control"),
    "mean_b": Definition(
        "matched rate in b", "1", "mean over prompts of side b's rate; missing at the same ids of all"
    ),
    "difference": Definition(
        "risk difference", "1", "rate in a less rate in b, matched as the control specifies", ci=_CI, null="0"
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
        raise InputError(
            "the risk difference needs the tokens of a run, and this run holds only sums: "
            "capture again with --record routing"
        )
    sides = (selection_of(a), selection_of(b))
    prompt, merged = index_of(run).prompts
    token_sides = TokenSides(run, sides, prompt)
    groups = token_sides.groups(np.random.default_rng(seed))
    n_groups = int(groups.max()) + 1
    weights = TokenIdWeights.of(token_sides, groups, n_groups)
    matchings = {name: token_sides.matching(control) for name, control in MATCHED.items()}
    matchings = {name: m for name, m in matchings.items() if (m.prompt_weight > 0).any()}
    rates, by_prompt, pooled, same_ids = selection_rates(token_sides, matchings, weights, groups)
    n_prompts = min(int(present.sum()) for present in token_sides.prompts_of_sides())
    tested = {name: _test_matched(by_prompt[name], m) for name, m in matchings.items()}
    tested["pooled"] = _test(pooled, n_prompts, (int(token_sides.counts[0].sum()), int(token_sides.counts[1].sum())))
    tested["pooled"] |= {"mean_a": rates[0], "mean_b": rates[1]}
    tested["token"] = _test(same_ids, n_prompts, weights.tokens)
    tested["token"] |= dict.fromkeys(("mean_a", "mean_b"), np.full(rates[0].shape, np.nan))
    cells = ("control", "layer", "expert")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in (n for n in DEFINITIONS if n not in ("rate_a", "rate_b")):
        values = np.stack([np.asarray(one[name]) for one in tested.values()])
        variables[name] = (cells[: values.ndim], values)
    variables |= {f"rate_{side}": (cells[1:], rates[i]) for i, side in enumerate("ab")}
    shape = rates.shape[1:]
    names = [selection_text(side) for side in sides]
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


def _test_matched(by_prompt: Float[np.ndarray, "2 prompt layer expert"], matching: Matching) -> dict[str, Any]:
    """Return difference, limits, p, q and verdict of a matched control, the rates, and what takes part."""
    used = matching.prompt_weight > 0
    difference, side_b = by_prompt[:, used]
    tested, mean_b = (
        paired_test(difference, matching.prompt_weight[used]),
        weighted_mean(side_b, matching.prompt_weight[used]),
    )
    return tested | {
        "mean_a": mean_b + tested["difference"],
        "mean_b": mean_b,
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
    rates = "pooled rates" if control == "token" else "rates"
    return "\n".join([*lines, f"Differences and {rates} of the listed experts: {label[0].lower()}{label[1:]}."])


def _describe_control(cell: xr.Dataset, label: str) -> list[str]:
    n = int(cell["prompts"])
    counts = f"{count_of(n, 'prompt')}, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
    if left_out := int(cell["tokens_excluded"]):
        counts += f"; excluded, as not paired: {count_of(int(cell['prompts_excluded']), 'prompt')}, {left_out:,} tokens"
    if not np.isfinite(cell["p"]).any():
        return [f"{label} ({counts}): cannot be tested, at least {MIN_PROMPTS} prompts are needed."]
    different, size = cell["different"].values, np.abs(cell["difference"].values)
    large = [int((different & (size > least)).sum()) for least in (0, 0.1, 0.3)]
    lines = [
        f"{label} ({counts}): {large[0]} of {different.size} experts differ, {large[1]} by more than 10 and {large[2]} "
        "by more than 30 percentage points."
    ]
    if not different.all():
        bound = wording("experts").bound(float(np.nanmax(np.where(different, np.nan, cell["bound"].values))))
        lines.append(
            f"  In each of the {(~different).sum()} others, a difference beyond {bound} is excluded (equivalence test, "
            "5 %)."
        )
    return lines + [f"  Warning: {text}." for text in (few_prompts(n),) if text]


def _line(cell: xr.Dataset, side: str) -> str:
    rates = ("mean_a", "mean_b") if np.isfinite(cell["mean_a"]) else ("rate_a", "rate_b")
    difference, low, high, a, b = (100 * float(cell[name]) for name in ("difference", "low", "high", *rates))
    return (
        f"  layer {int(cell['layer'])} expert {int(cell['expert'])}, more in {side}: {signed(difference, 1)} points "
        f"[{signed(low, 1)}, {signed(high, 1)}]; {a:.1f} % against {b:.1f} %"
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
    experts: dict[str, dict[int, list[int]]] = {"promote": {}, "demote": {}}
    for name, sign in (("promote", 1), ("demote", -1)):
        size = np.where(cell["different"], sign * cell["difference"], -np.inf)
        for cell_index in np.argsort(-size, axis=None)[:n]:
            layer, expert = np.unravel_index(cell_index, size.shape)
            if size[layer, expert] > 0:
                experts[name].setdefault(int(layer), []).append(int(expert))
    return experts
