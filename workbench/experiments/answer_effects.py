"""What edits, or another model, change of newly generated answers, with intervals and ranks among random controls.

`behaviour` takes any edits of `wb.hooks.interventions` and any controls; `between_models` compares two models.

    result = behaviour(model, rows, {"no sinks": remove_sinks(range(4))}, controls={"no sinks": [...]})
"""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments.answer_measures import (
    MEASURES,
    SHARES,
    Answer,
    correctness,
    generate_answers,
    measure,
    measure_changes,
    with_answers,
)
from workbench.experiments.effects import routing
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls, family_p, rank
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss
from workbench.studies.intervals import (
    MIN_PROMPTS,
    mean_effect,
    prompt_means,
    share_change_interval,
)
from workbench.studies.statistics import ALPHA, false_discovery

Recipe = Edit | Sequence[Edit]
METHOD = (
    "Answers at temperature 0 to the prompts of the sequences, with the edit less without. correct: the final message "
    "is the expected text; an unfinished answer is wrong. complete: the answer ended. refused: the final message "
    "begins with a phrase of refusal. same answer: the final message is that without the edit (of unfinished answers: "
    "all tokens are). Tokens before divergence: share of the unedited answer's tokens before the first that differs. "
    "Routing flips: share of (token, slot) choices of experts lost from the prompt's last token to the answer's last "
    "common one. "
    "Intervals over prompts: Student's t with two pseudo-prompts for changes of shares, bootstrap-t otherwise; q over "
    "all measures and edits. The null of an edit is the distribution of the effects of random edits of the same kind "
    "and dose: rank p (two-sided), p_family adjusted for the doses of a measure (single-step max-T). Measures are "
    "tested separately."
)
NOT_CONTROLLED = (
    "An edit takes the model off the states it was trained in, and errors spread through an answer; only an effect "
    "beyond that of the random controls is one of what was chosen. Refusals are recognised by phrases."
)


def behaviour(
    model: GptOss,
    rows: Sequence[Transcript],
    recipes: Mapping[str, Recipe],
    *,
    controls: Mapping[str, Sequence[Recipe]] | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> xr.Dataset:
    """Return what each recipe of edits changes of newly generated answers, ranked among its random controls.

    Variables over (intervention, measure): change, low, high, p, q; p_rank, p_family and distance where there are
    controls; over (control, intervention, measure): random. Over measure: unedited, the mean without an edit.

    Raises:
        InputError: the sequences are of fewer than five prompts, or a recipe has fewer than 20 controls.
    """
    units = [row.prompt_id for row in rows]
    if (n := len(set(units))) < MIN_PROMPTS:
        raise InputError(f"{n} prompts, and an interval needs {MIN_PROMPTS}: use more sequences")
    drawn = {name: [_edits(r) for r in (controls or {}).get(name, ())] for name in recipes}
    n_controls = max(map(len, drawn.values()))
    for own in drawn.values():
        check_controls(len(own) if own else n_controls or MIN_CONTROLS)
    base = generate_answers(model, rows, max_new_tokens=max_new_tokens)
    routes = routing(model, with_answers(rows, base))

    def measured(edits: Sequence[Edit]) -> np.ndarray:
        return measure(model, rows, base, *edits, max_new_tokens=max_new_tokens, routes=routes)

    changes = np.stack([measured(_edits(recipe)) for recipe in recipes.values()])
    random = np.full((n_controls, len(recipes), len(MEASURES)), np.nan)
    for i, own in enumerate(drawn.values()):
        for j, edits in enumerate(own):
            random[j, i] = _means(measured(edits), units)
    cells = ("intervention", "measure")
    result = xr.Dataset(
        {name: (cells, values) for name, values in _tested(changes, units, seed).items()}
        | {name: (cells, values) for name, values in _ranked(changes, units, random).items()}
        | {"random": (("control", *cells), random), "unedited": ("measure", _unedited(rows, base, units))},
        coords={"intervention": list(recipes), "measure": list(MEASURES), "control": range(n_controls)},
        attrs={"rests_on": f"{count_of(len(rows), 'sequence')} of {count_of(n, 'prompt')}", "prompts": n}
        | {"method": METHOD, "not_controlled": NOT_CONTROLLED},
    )
    return result.assign_attrs(title="Generated answers under interventions", summary=describe(result))


def between_models(
    model: GptOss, other: GptOss, rows: Sequence[Transcript], *, max_new_tokens: int = 256, seed: int = 0
) -> xr.Dataset:
    """Return what the answers of another model, such as a fine-tuned one, change: as `behaviour`, without controls.

    other: has the vocabulary of the first. Both answer the prompts of the sequences; "same answer" and divergence are
    those from the first model's answers, and routing flips are counted on the first model's tokens.

    Raises:
        InputError: the sequences are of fewer than five prompts, or the models differ in vocabulary or routing.
    """
    units = [row.prompt_id for row in rows]
    if (n := len(set(units))) < MIN_PROMPTS:
        raise InputError(f"{n} prompts, and an interval needs {MIN_PROMPTS}: use more sequences")
    for name in ("d_vocab", "n_layers", "num_experts", "experts_per_token"):
        if (a := getattr(model.cfg, name)) != (b := getattr(other.cfg, name)):
            raise InputError(f"the models differ in {name} ({a} and {b}): their answers and experts do not correspond")
    base, others = (generate_answers(m, rows, max_new_tokens=max_new_tokens) for m in (model, other))
    answered = with_answers(rows, base)
    changes = measure_changes(rows, base, others, routing(model, answered), routing(other, answered))[None]
    cells, none = ("intervention", "measure"), np.full((0, 1, len(MEASURES)), np.nan)
    result = xr.Dataset(
        {name: (cells, values) for name, values in _tested(changes, units, seed).items()}
        | {name: (cells, values) for name, values in _ranked(changes, units, none).items()}
        | {"random": (("control", *cells), none), "unedited": ("measure", _unedited(rows, base, units))},
        coords={"intervention": ["other model"], "measure": list(MEASURES), "control": range(0)},
        attrs={"rests_on": f"{count_of(len(rows), 'sequence')} of {count_of(n, 'prompt')}", "prompts": n}
        | {"method": METHOD, "not_controlled": NOT_CONTROLLED},
    )
    return result.assign_attrs(title="Generated answers of two models", summary=describe(result))


def _edits(recipe: Recipe) -> list[Edit]:
    return [recipe] if isinstance(recipe, Edit) else list(recipe)


def _means(values: Float[np.ndarray, "measure sequence"], units: Sequence[str]) -> Float[np.ndarray, " measure"]:
    return np.array([prompt_means(one, units).mean() if np.isfinite(one).any() else np.nan for one in values])


def _unedited(rows: Sequence[Transcript], base: Sequence[Answer], units: Sequence[str]) -> np.ndarray:
    ones = np.ones(len(rows))
    values = [
        [correctness(a, row) for a, row in zip(base, rows, strict=True)],
        [float(a.text is not None) for a in base],
        [float(a.refused) for a in base],
        ones,
        [float(len(a.ids)) for a in base],
        [float(a.analysis_tokens) for a in base],
        ones,
        0 * ones,
    ]
    return _means(np.array(values), units)


def _tested(
    changes: Float[np.ndarray, "intervention measure sequence"], units: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Return change, low, high, p and q over prompts; measures without a value stay NaN."""
    shape = changes.shape[:2]
    out = {name: np.full(shape, np.nan) for name in ("change", "low", "high", "p")}
    for i, name in enumerate(MEASURES):
        if not np.isfinite(changes[:, i]).any() or len(set(np.array(units)[np.isfinite(changes[0, i])])) < MIN_PROMPTS:
            continue
        effect = mean_effect(changes[:, i], units, seed=seed)
        limits = share_change_interval(changes[:, i], units) if name in SHARES else effect[:3]
        for key, values in zip(("change", "low", "high"), limits, strict=True):
            out[key][:, i] = values
        out["p"][:, i] = effect.p
    return out | {"q": false_discovery(out["p"])}


def _ranked(
    changes: Float[np.ndarray, "intervention measure sequence"],
    units: Sequence[str],
    random: Float[np.ndarray, "control intervention measure"],
) -> dict[str, np.ndarray]:
    """Return rank p, p adjusted for the interventions of a measure, and distance; NaN without controls."""
    change = np.stack([_means(one, units) for one in changes])
    out = {name: np.full(change.shape, np.nan) for name in ("p_rank", "p_family", "distance")}
    known = np.isfinite(random).all(0) & np.isfinite(change) if len(random) else np.zeros(change.shape, dtype=bool)
    for column in np.flatnonzero(known.any(0)):
        of = known[:, column]
        out["p_family"][of, column] = family_p(change[of, column], random[:, of, column])
    for cell in zip(*np.nonzero(known), strict=True):
        ranked = rank(float(change[cell]), random[(slice(None), *cell)])
        out["p_rank"][cell], out["distance"][cell] = ranked.p, ranked.distance
    return out


def describe(result: xr.Dataset) -> str:
    """Return the summary: what each intervention changes, and whether random controls do the same."""
    shown = [m for m in MEASURES if np.isfinite(result["change"].sel(measure=m)).any()]
    unedited = ", ".join(f"{m} {float(result['unedited'].sel(measure=m)):.3g}" for m in shown)
    controls = f", {n} random controls" if (n := result.sizes["control"]) else ""
    lines = [f"{result.attrs['rests_on']}{controls}. Without an edit: {unedited}."]
    for name in map(str, result["intervention"].values):
        lines.append(f"{name}:")
        for m in shown:
            one = result.sel(intervention=name, measure=m)
            change, low, high, p = (float(one[v]) for v in ("change", "low", "high", "p_family"))
            text = f"  {m} {signed_interval(change, low, high, 3, 'g')}"
            if np.isfinite(p):
                verdict = "beyond random controls" if p <= ALPHA else "not shown to differ from random controls"
                random = one["random"]
                mean, least, most = (signed(float(v), 3, "g") for v in (random.mean(), random.min(), random.max()))
                text += (
                    f"; random {mean} ({least} to {most}), {verdict} (rank p {float(one['p_rank']):.3f}, {p:.3f} for "
                    "all doses)"
                )
            lines.append(f"{text}.")
    return "\n".join(lines)
