"""Generated answers under interventions: accuracy, length, refusals and routing of new answers, at several doses.

The model answers the prompts of the sequences at temperature 0, without an edit and with each. A chosen edit is ranked
among the same edits of at least 20 random sets of experts of equal load, or of random directions of equal norm, in the
same dose. `behaviour` takes any edits of `wb.hooks.interventions` and any controls.

    found = behaviour(model, rows, {"no sinks": remove_sinks(range(4))}, controls={"no sinks": [...]})

Reference: SteerMoE, arXiv 2509.09660; arXiv 2606.10703, for which selection statistics do not predict such effects.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.errors import InputError
from workbench.experiments.effects import load_of, routed_slots, routing
from workbench.experiments.expert_sets import Cells, group_of, matched_sets, named_experts
from workbench.experiments.final_channel import ALPHA, generated_tokens
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls, family_p, rank
from workbench.experiments.steering import channel_direction, random_directions
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.hooks.interventions import forbid, reweight, steer
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import (
    MIN_PROMPTS,
    mean_effect,
    prompt_means,
    share_change_interval,
)
from workbench.studies.statistics import false_discovery

EXPERIMENT = Experiment(
    name="generated-answers",
    title="Generated answers under interventions",
    question="What do interventions change of accuracy, length and refusals of newly generated answers, beyond what "
    "random ones of the same size do?",
    compute="new answers to the prompts of the sequences: for each of about three doses, one and 20 of random controls",
    cost={"passes": 128, "sequence_new_tokens": 16384},
    options={
        "change": "experts: gate weights of a group's experts times the dose, 0 masking them before the top-k "
        "selection (default); direction: the channel direction times the dose.",
        "group": "Domain or task whose experts are changed (default: that of most sequences).",
        "doses": "Doses, separated by commas (default: 0,0.5,2 for experts; -1,1 for direction).",
        "controls": "Random sets or directions for each dose, at least 20 (default: 20).",
        "max_new_tokens": "Most tokens of an answer (default: 256).",
    },
    figures="workbench.figures.generated_answers",
    order=105,
)
Recipe = Edit | Sequence[Edit]
SHARES = ("correct", "complete", "refused", "same answer")  # 0 or 1 of each answer
MEASURES = (*SHARES, "new tokens", "analysis tokens", "tokens before divergence", "routing flips")
# How a final answer begins that refuses; typographic apostrophes count as plain ones.
REFUSAL = r"(i'm sorry|i am sorry|sorry,|i can't|i cannot|i can not|i won't|i'm unable|i am unable|as an ai)\b"
METHOD = (
    "Answers at temperature 0 to the prompts of the sequences, with the edit less without. correct: the final message "
    "is the expected text; an unfinished answer is wrong. complete: the answer ended. refused: the final message "
    "begins with a phrase of refusal. same answer: the final message is that without the edit (of unfinished answers: "
    "all tokens are). Tokens before divergence: share of the unedited answer's tokens before the first that differs. "
    "Routing flips: share of (token, slot) choices of experts lost at the unedited answer's own tokens up to there. "
    "Intervals over prompts: Student's t with two pseudo-prompts for changes of shares, bootstrap-t otherwise; q over "
    "all measures and edits. The null of an edit is the distribution of the effects of random edits of the same kind "
    "and dose: rank p (two-sided), p_family adjusted for the doses of a measure (single-step max-T). Measures are "
    "tested separately."
)
NOT_CONTROLLED = (
    "An edit takes the model off the states it was trained in, and errors spread through an answer; only an effect "
    "beyond that of the random controls is one of what was chosen. Refusals are recognised by phrases."
)


class Answer(NamedTuple):
    """A new answer: its ids, the text of its final message (None: there is no finished one), and its analysis."""

    ids: list[int]
    text: str | None
    analysis_tokens: int
    refused: bool


def generate_answers(
    model: GptOss,
    rows: Sequence[Transcript],
    *edits: Edit,
    max_new_tokens: int = 256,
    refusal: str = REFUSAL,
    batch: int = 64,
) -> list[Answer]:
    """Return the model's answers to the prompts of the sequences at temperature 0, with the edits."""
    prompts = [row.tokens[: row.n_prompt].tolist() for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    new: dict[int, list[int]] = {}
    with applied(model, *edits):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            continued = model.generate([prompts[i] for i in chosen], max_new_tokens=max_new_tokens)
            new.update(zip(chosen, continued, strict=True))
    return [_answer(model, prompts[i], new[i], re.compile(refusal)) for i in range(len(prompts))]


def _answer(model: GptOss, prompt: list[int], new: list[int], refusal: re.Pattern[str]) -> Answer:
    ids = np.array([*prompt, *new])
    labels = harmony.label(ids, tokenizer=model.tokenizer, n_prompt=len(prompt))
    analysis = sum(m.stop - m.content for m in labels.messages if m.channel == "analysis" and m.content >= len(prompt))
    text = final_text(ids, model.tokenizer)
    lowered = (text or "").replace("’", "'").lower()
    return Answer(new, text, analysis, refusal.match(lowered) is not None)


def measure(
    model: GptOss,
    rows: Sequence[Transcript],
    base: Sequence[Answer],
    *edits: Edit,
    max_new_tokens: int = 256,
    routes: Sequence[np.ndarray] | None = None,
) -> Float[np.ndarray, "measure sequence"]:
    """Return every measure of the answers with the edits, less that without: `MEASURES` by sequence.

    For "same answer", "tokens before divergence" and "routing flips" the value without an edit is 1, 1 and 0. "correct"
    is NaN where the expected text is not known. routes: the experts [layer pos slot]
    of each unedited answer, if they are known already.
    """
    answers = generate_answers(model, rows, *edits, max_new_tokens=max_new_tokens)
    answered = _answered(rows, base)
    before = routing(model, answered) if routes is None else routes
    with applied(model, *edits):
        after = routing(model, answered)
    return _changes(rows, base, answers, before, after)


def _changes(
    rows: Sequence[Transcript],
    base: Sequence[Answer],
    after_edits: Sequence[Answer],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> Float[np.ndarray, "measure sequence"]:
    """Return every measure of the answers `after_edits`, less that of `base`.

    before, after: the experts [layer pos slot] of each sequence with its base answer, without and with what is changed.
    """
    common = [_common(b.ids, f.ids) for b, f in zip(base, after_edits, strict=True)]
    flips = [
        _flips(x[:, : r.n_prompt + n], y[:, : r.n_prompt + n])
        for x, y, r, n in zip(before, after, rows, common, strict=True)
    ]
    right = np.array(
        [[_right(a, row) for a, row in zip(answers, rows, strict=True)] for answers in (after_edits, base)]
    )
    return np.array(
        [
            right[0] - right[1],
            _change([a.text is not None for a in after_edits], [a.text is not None for a in base]),
            _change([a.refused for a in after_edits], [a.refused for a in base]),
            np.array([float(_same(a, b)) - 1 for a, b in zip(after_edits, base, strict=True)]),
            _change([len(a.ids) for a in after_edits], [len(a.ids) for a in base]),
            _change([a.analysis_tokens for a in after_edits], [a.analysis_tokens for a in base]),
            np.array([n / max(len(b.ids), 1) - 1 for n, b in zip(common, base, strict=True)]),
            np.array(flips),
        ]
    )


def _answered(rows: Sequence[Transcript], base: Sequence[Answer]) -> list[Transcript]:
    """Return the sequences with the new answers in place of theirs."""
    return [
        Transcript(r.id, r.prompt_id, r.effort, np.array([*r.tokens[: r.n_prompt], *b.ids], np.int32), r.n_prompt)
        for r, b in zip(rows, base, strict=True)
    ]


def _change(after: Sequence[float], before: Sequence[float]) -> Float[np.ndarray, " sequence"]:
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def _same(a: Answer, b: Answer) -> bool:
    """Return whether two final messages are equal; of answers without a finished one, all ids."""
    return a.ids == b.ids if a.text is None or b.text is None else a.text == b.text


def _right(answer: Answer, row: Transcript) -> float:
    return np.nan if row.answer is None else float(answer.text == row.answer)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two answers begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _flips(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of chosen experts [layer pos slot] that are no longer chosen."""
    return float(1 - (before[..., :, None] == after[..., None, :]).any(-1).mean())


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
    routes = routing(model, _answered(rows, base))

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
        attrs={"rests_on": f"{len(rows)} sequences of {n} prompts", "method": METHOD, "not_controlled": NOT_CONTROLLED},
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
    answered = _answered(rows, base)
    changes = _changes(rows, base, others, routing(model, answered), routing(other, answered))[None]
    cells, none = ("intervention", "measure"), np.full((0, 1, len(MEASURES)), np.nan)
    result = xr.Dataset(
        {name: (cells, values) for name, values in _tested(changes, units, seed).items()}
        | {name: (cells, values) for name, values in _ranked(changes, units, none).items()}
        | {"random": (("control", *cells), none), "unedited": ("measure", _unedited(rows, base, units))},
        coords={"intervention": ["other model"], "measure": list(MEASURES), "control": range(0)},
        attrs={"rests_on": f"{len(rows)} sequences of {n} prompts", "method": METHOD, "not_controlled": NOT_CONTROLLED},
    )
    return result.assign_attrs(title="Generated answers of two models", summary=describe(result))


def _edits(recipe: Recipe) -> list[Edit]:
    return [recipe] if isinstance(recipe, Edit) else list(recipe)


def _means(values: Float[np.ndarray, "measure sequence"], units: Sequence[str]) -> Float[np.ndarray, " measure"]:
    return np.array([prompt_means(one, units).mean() if np.isfinite(one).any() else np.nan for one in values])


def _unedited(rows: Sequence[Transcript], base: Sequence[Answer], units: Sequence[str]) -> np.ndarray:
    ones = np.ones(len(rows))
    values = [
        [_right(a, row) for a, row in zip(base, rows, strict=True)],
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
            text = f"  {m} {change:+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if np.isfinite(low) else "")
            if np.isfinite(p):
                verdict = "beyond random controls" if p <= ALPHA else "not shown to differ from random controls"
                text += (
                    f"; random {float(one['random'].mean()):+.3g} ({float(one['random'].min()):+.3g} to "
                    f"{float(one['random'].max()):+.3g}), {verdict} (rank p {float(one['p_rank']):.3f}, {p:.3f} for "
                    "all doses)"
                )
            lines.append(f"{text}.")
    return "\n".join(lines)


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    change: Literal["experts", "direction"] = "experts",
    group: str = "",
    doses: str = "",
    controls: int = MIN_CONTROLS,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the dose curve of a change of experts or along the channel direction, on newly generated answers.

    Raises:
        InputError: the change, the group or a dose is unknown, or there are too few controls or prompts.
    """
    check_controls(controls)
    if change not in ("experts", "direction"):
        raise InputError(f"change={change!r}: use experts or direction")
    wanted = _doses(doses or ("0,0.5,2" if change == "experts" else "-1,1"))
    if change == "experts":
        recipes, null, about = _expert_recipes(model, rows, group, wanted, controls, seed)
    else:
        recipes, null, about = _direction_recipes(model, rows, wanted, controls, seed)
    rows = [row for row in rows if not group or group_of(row) == group] if change == "experts" else rows
    result = behaviour(model, rows, recipes, controls=null, max_new_tokens=max_new_tokens, seed=seed)
    result = result.assign_coords(dose=("intervention", list(wanted)))
    title = f"Generated answers under {about['what']}"
    summary = f"{about['what']}.\n{result.attrs['summary']}"
    return {"answers": result.assign_attrs(title=title, summary=summary, null=json.dumps(about))}


def _doses(text: str | float) -> list[float]:
    try:
        doses = [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise InputError(f"doses={text!r}: expected numbers separated by commas, such as 0,0.5,2") from error
    if len(set(doses)) < len(doses) or not np.isfinite(doses).all():
        raise InputError(f"doses={text!r}: expected different finite numbers")
    return doses


Recipes = tuple[dict[str, list[Edit]], dict[str, list[list[Edit]]], dict[str, str]]


def _expert_recipes(
    model: GptOss, rows: Sequence[Transcript], group: str, doses: Sequence[float], n: int, seed: int
) -> Recipes:
    names = [group_of(row) for row in rows]
    if len(set(names)) < 2:
        raise InputError("the run's sequences are of one group (meta: domain or task): there are no others to compare")
    group = group or max(sorted(set(names)), key=names.count)
    if group not in names:
        raise InputError(f"group={group!r}: the sequences have {', '.join(sorted(set(names)))}")
    if min(doses) < 0:
        raise InputError(f"doses={list(doses)}: gate weights are multiplied by 0 or more")
    own = [row for row, name in zip(rows, names, strict=True) if name == group]
    own_set = named_experts(model, rows, group)
    load = np.nan_to_num(load_of(routed_slots(model, own, generated_tokens(model))))
    sets = matched_sets(load, own_set, n, seed)
    if len(sets) < MIN_CONTROLS:
        raise InputError(f"fewer than {MIN_CONTROLS} random sets have the load of the experts of {group}: no null")
    written = generated_tokens(model)

    def edits(cells: Cells, dose: float) -> list[Edit]:
        layers = {at: [e for layer, e in cells if layer == at] for at, _ in cells}
        if dose == 0:
            return [forbid(layer, experts, written) for layer, experts in sorted(layers.items())]
        return [reweight(layer, experts, dose, written) for layer, experts in sorted(layers.items())]

    listed = ", ".join(f"{layer}.{expert}" for layer, expert in own_set)
    recipes = {f"gates × {dose:g}" if dose else "masked before top-k": edits(own_set, dose) for dose in doses}
    null = {name: [edits(cells, dose) for cells in sets] for name, dose in zip(recipes, doses, strict=True)}
    return recipes, null, {"what": f"changes of the experts of {group} ({listed})", "group": group}


def _direction_recipes(model: GptOss, rows: Sequence[Transcript], doses: Sequence[float], n: int, seed: int) -> Recipes:
    point = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    direction = channel_direction(model, rows, point)
    random = random_directions(direction, n, seed)
    written = token_set(tokenizer=model.tokenizer, role="assistant")

    def edits(vector: torch.Tensor, dose: float) -> list[Edit]:
        return [steer(point, vector, dose, written)]

    recipes = {f"{dose:+g} × (final − analysis)": edits(direction, dose) for dose in doses}
    null = {name: [edits(v, dose) for v in random] for name, dose in zip(recipes, doses, strict=True)}
    return recipes, null, {"what": f"steering along the channel direction at {point}"}
