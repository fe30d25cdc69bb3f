"""The sink difference study: how much more attention do heads give to sinks at tokens with one label than another?

The sides are any two token selections, as in the risk difference of experts: roles, channels, parts, efforts, right and
wrong answers. Differences are taken within prompts, by the engine of all studies (`workbench.studies.matching`), and
under the control "prompt and token" at the same token ids as well.

    heads = study(wb.open_run("run.zarr"), a="role=developer", b="role=user")["heads"]
"""

from collections.abc import Mapping

import numpy as np
import scipy.sparse
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.registry import Study
from workbench.studies.difference_tests import paired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.matching import Matching
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import Control, TokenRun, duplicates_warning, index_of
from workbench.studies.selection_rates import TokenSides
from workbench.studies.token_labels import Selection, selection_of, selection_text
from workbench.studies.wording import wording

STUDY = Study(
    name="sink-difference",
    title="Sink attention by label",
    question="Which heads give more attention to their sinks at tokens with one label than at tokens with another?",
    requires=("sinks",),
    compute="two passes over the run's tokens; jackknife over prompts",
    options={
        "a": "Tokens of side a, as role=developer or channel=final,effort=high (default: role=developer).",
        "b": "Tokens of side b (default: role=user).",
    },
    figures="workbench.figures.sink_difference",
    order=46,
)
CONTROLS: dict[str, Control] = {"prompt": "none", "prompt and token": "token"}  # the engine's control of each
_LABELS = {"prompt": "Within prompts", "prompt and token": "Within prompts, at the same token ids"}
_NAMED = 5  # heads of each side that the summary lists
_CI = "95 %, delete-one jackknife over prompts, Student's t corrected for skewness"
DEFINITIONS = {
    "mean_a": Definition("sink attention in a", "1", "mean attention probability on the sink at tokens of side a"),
    "mean_b": Definition("sink attention in b", "1", "mean attention probability on the sink at tokens of side b"),
    "difference": Definition("difference", "1", "mean in a less mean in b, matched as the control specifies", ci=_CI),
    "low": Definition("difference, lower limit", "1", "lower limit of difference", ci=_CI),
    "high": Definition("difference, upper limit", "1", "upper limit of difference", ci=_CI),
    "p": Definition("p", "1", "two-sided, as the interval; missing: cannot be tested", null="0"),
    "q": Definition("q", "1", "Benjamini–Hochberg over all layers × heads of this control"),
    "different": Definition("differs", "1", "q < 0.05 and the interval excludes zero"),
    "bound": Definition("equivalence bound", "1", "smallest bound within which it is shown to lie (TOST, p < 0.05)"),
    "tokens_a": Definition("tokens in a", "tokens", "tokens of side a that take part"),
    "tokens_b": Definition("tokens in b", "tokens", "tokens of side b that take part"),
    "prompts": Definition("prompts", "prompts", "prompts that take part"),
    "position_a": Definition("position in a", "tokens", "mean position of side a's tokens in their sequences"),
    "position_b": Definition("position in b", "tokens", "mean position of side b's tokens in their sequences"),
}
METHOD = (
    "Mean attention probability on the learned sink of each head at tokens of side a, less that at tokens of side b. "
    "'prompt': within each sequence that has both sides or, where none has, between the means of a prompt's sequences; "
    "averaged over prompts with equal weight. 'prompt and token': the same at equal token ids; a prompt with m matched "
    "tokens weighs m / (m + 10). Intervals and tests over prompts; a head differs if q < 0.05 and its interval "
    "excludes zero."
)
NOT_CONTROLLED = (
    "Position is not matched, and a token that sees more keys gives less attention to the sink: sides that stand at "
    "different positions, as a developer message before that of the user, differ for this reason alone. The summary "
    "states the mean positions; conversations with the sides in either order keep them equal."
)


def study(
    run: TokenRun, *, a: Selection = "role=developer", b: Selection = "role=user", seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return the difference of sink attention of every head between two token selections, by control.

    a, b: labels as text ("role=user,part=content") or as a mapping, or a token set.

    Raises:
        InputError: the run holds no tokens, a label is unknown, a side has no token, the sides share tokens, or no
            prompt has both.
    """
    if not isinstance(run, TokenRun):
        raise InputError(
            "the sink difference needs the tokens of a run, and this run holds only sums: "
            "capture again with --record routing --record sinks"
        )
    sides = (selection_of(a), selection_of(b))
    names = [selection_text(side) for side in sides]
    prompt, merged = index_of(run).prompts
    tokens = TokenSides(run, sides, prompt)
    matchings = {name: tokens.matching(control) for name, control in CONTROLS.items()}
    matchings = {name: m for name, m in matchings.items() if (m.prompt_weight > 0).any()}
    if not matchings:
        raise InputError(f"no prompt has tokens of both sides, {names[0]} and {names[1]}: choose other labels")
    means, positions, by_prompt = _sums(tokens, matchings)
    tested = {
        name: paired_test(by_prompt[name][m.prompt_weight > 0], m.prompt_weight[m.prompt_weight > 0])
        | {"tokens_a": m.tokens[0], "tokens_b": m.tokens[1], "prompts": int((m.prompt_weight > 0).sum())}
        for name, m in matchings.items()
    }
    cells = ("control", "layer", "head")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in (n for n in DEFINITIONS if n in next(iter(tested.values()))):
        values = np.stack([np.asarray(one[name]) for one in tested.values()])
        variables[name] = (cells[: values.ndim], values)
    for i, side in enumerate("ab"):
        variables |= {f"mean_{side}": (cells[1:], means[i]), f"position_{side}": ((), positions[i])}
    title = f"Sink attention: {names[0]} against {names[1]}"
    attrs = provenance(STUDY.name, title, run.digest, seed, {"a": names[0], "b": names[1]}) | {
        "a": names[0],
        "b": names[1],
        "duplicate_prompts": merged,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"control": list(tested), "layer": np.arange(means.shape[1]), "head": np.arange(means.shape[2])}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    return {"heads": result.assign_attrs(summary=_summary(result))}


def _sums(
    sides: TokenSides, matchings: Mapping[str, Matching]
) -> tuple[Float[np.ndarray, "side layer head"], Float[np.ndarray, " side"], dict[str, np.ndarray]]:
    """Return both sides' means and mean positions, and the matched difference of each control [prompt layer head]."""
    model, n = sides.run.model, len(sides.code)
    layers, heads, n_prompts = model["n_layers"], model["n_heads"], int(sides.number.max()) + 1
    total, position, count = np.zeros((2, layers, heads)), np.zeros(2), np.zeros(2)
    by_prompt = {name: np.zeros((n_prompts, layers, heads)) for name in matchings}
    for block, side in sides.blocks("sink"):
        at = np.flatnonzero(side >= 0)
        own, code = side[at], np.searchsorted(sides.code, sides.codes(block)[at])
        count += np.bincount(own, minlength=2)
        position += np.bincount(own, block["position"][at].astype(np.float64), 2)
        rows, tokens = sides.prompt[code], np.arange(len(at))
        of_sides = scipy.sparse.csr_array((np.ones(len(at)), (own, tokens)), shape=(2, len(at)))
        weights = {
            name: scipy.sparse.csr_array((m.difference[own * n + code], (rows, tokens)), shape=(n_prompts, len(at)))
            for name, m in matchings.items()
        }
        for layer, values in enumerate(block["sink"]):
            chosen = values[at].astype(np.float64)
            total[:, layer] += of_sides @ chosen
            for name, weight in weights.items():
                by_prompt[name][:, layer] += weight @ chosen
    return total / count[:, None, None], position / count, by_prompt


def _summary(result: xr.Dataset) -> str:
    """Return the counts of each control, and below the first of them the heads that differ most within prompts."""
    names = (str(result.attrs["a"]), str(result.attrs["b"]))
    lines = [text] if (text := duplicates_warning(int(result.attrs["duplicate_prompts"]))) else []
    for i, control in enumerate(map(str, result["control"].values)):
        cell = result.sel(control=control)
        n, different = int(cell["prompts"]), cell["different"].values
        counts = f"{count_of(n, 'prompt')}, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
        if not np.isfinite(cell["p"]).any():
            lines.append(f"{_LABELS[control]} ({counts}): cannot be tested, at least {MIN_PROMPTS} prompts are needed.")
            continue
        lines.append(f"{_LABELS[control]} ({counts}): {int(different.sum())} of {different.size} heads differ.")
        lines += _most_different(cell, names) if i == 0 else []
        lines += [f"  Warning: {text}." for text in (few_prompts(n),) if text]
    lines.append(
        f"Mean position of the tokens: {float(result['position_a']):.0f} in {names[0]}, "
        f"{float(result['position_b']):.0f} in {names[1]}; tokens that see more keys attend less to sinks."
    )
    return "\n".join(lines)


def _most_different(cell: xr.Dataset, names: tuple[str, str]) -> list[str]:
    """Return a line for each of the heads that differ most in either direction."""
    words = wording("sink")
    lines: list[str] = []
    for sign, side in ((1, names[0]), (-1, names[1])):
        size = np.where(cell["different"], sign * cell["difference"], -np.inf)
        for flat in np.argsort(-size, axis=None)[:_NAMED]:
            layer, head = np.unravel_index(flat, size.shape)
            if size[layer, head] > 0:
                one = cell.isel(layer=int(layer), head=int(head))
                change = words.interval(*(float(one[name]) for name in ("difference", "low", "high")))
                lines.append(f"  layer {layer} head {head}, more in {side}: {change}")
    return lines
