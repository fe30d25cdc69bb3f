"""A recipe on many prompts, ranked among random interventions of the same kind and size.

    found = recipe_study(model, recipe, "prompts.jsonl", controls=20)
    print(found["recipe"].attrs["summary"])

What is measured and tested is that of `workbench.experiments.answer_effects`. The random interventions have experts
of equal load, heads of the same layers, or directions of equal norm, with the recipe's tokens and strengths.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.experiments.answer_effects import behaviour
from workbench.experiments.effects import load_of, routed_slots
from workbench.experiments.expert_sets import matched_sets
from workbench.experiments.final_channel import generated_tokens
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls
from workbench.experiments.steering import random_directions
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import steer
from workbench.model.transformer import GptOss
from workbench.research.answers import Prompts, answers
from workbench.research.intervention import CELL_KINDS, STEERING_KINDS, Intervention
from workbench.research.intervention_edits import edits_of, vectors_of
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources
from workbench.version import version

# what a refusal points to, by the kind of an intervention that acts on every head
_STUDIES_OF_EVERY_HEAD = {
    "scale_sinks": "use `workbench study sink-ablation`, ",
    "knockout": "use `workbench study attention-knockout`, ",
}


def recipe_study(
    model: GptOss,
    recipe: Recipe,
    prompts: Prompts,
    *,
    controls: int = MIN_CONTROLS,
    sources: SteeringSources | None = None,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return what a recipe changes of newly generated answers to prompts, at temperature 0.

    controls: random interventions of the same kind and size, at least 20, or 0 for intervals alone. The recipe gives
    the effort, the most new tokens and the interventions; its own prompt is not used.

    Raises:
        InputError: the recipe has no interventions or no random ones of its kind exist, or prompts are too few.
    """
    if not recipe.interventions:
        raise InputError("the recipe has no interventions: there is nothing to test")
    recipe.check_other_prompts()
    if controls:
        check_controls(controls)
    rows = answers(model, prompts, effort=recipe.effort, max_new_tokens=recipe.max_new_tokens).transcripts
    edits = recipe.edits(model, rows, sources=sources)
    drawn = _RandomInterventions(model, recipe, rows, sources or SteeringSources()).draw(controls, seed)
    null = {"recipe": drawn} if drawn else None
    result = behaviour(model, rows, {"recipe": edits}, controls=null, max_new_tokens=recipe.max_new_tokens, seed=seed)
    what = "; ".join(one.describe() for one in recipe.interventions)
    attrs = {
        "study": "generated-answers",
        "title": "A recipe on prompts, beside random interventions",
        "summary": f"{what}.\n{result.attrs['summary']}",
        "recipe": recipe.to_json(indent=None),
        "seed": seed,
        "workbench_version": version(),
        "checkpoint_digest": model.checkpoint.digest,
        "parameters": json.dumps({"controls": controls, "max_new_tokens": recipe.max_new_tokens}),
    }
    if isinstance(prompts, str | Path):
        attrs["prompts"] = Path(prompts).name
    return {"recipe": result.assign_attrs(attrs)}


class _RandomInterventions:
    """Draws random interventions in place of those of a recipe."""

    def __init__(self, model: GptOss, recipe: Recipe, rows: Sequence[Transcript], sources: SteeringSources) -> None:
        self._model, self._recipe, self._rows, self._sources = model, recipe, rows, sources

    def draw(self, n: int, seed: int) -> list[list[Edit]]:
        """Return n lists of edits, each with every intervention of the recipe exchanged for a random one."""
        if not n:
            return []
        sets = [self._one(one, n, seed + i) for i, one in enumerate(self._recipe.interventions)]
        least = min(map(len, sets))
        return [[edit for drawn in sets for edit in drawn[i]] for i in range(least)]

    def _one(self, one: Intervention, n: int, seed: int) -> list[list[Edit]]:
        if one.kind in CELL_KINDS:
            return [self._edits(replace(one, cells=cells)) for cells in self._expert_sets(one, n, seed)]
        if one.kind in STEERING_KINDS:
            return self._directions(one, n, seed)
        if one.heads:
            return [self._edits(replace(one, heads=heads)) for heads in self._head_sets(one, n, seed)]
        study = _STUDIES_OF_EVERY_HEAD.get(one.kind, "")
        raise InputError(
            f"the intervention {one.kind!r} acts on every head, for which there are no random ones: choose heads, "
            f"{study}or --controls 0"
        )

    def _edits(self, one: Intervention) -> list[Edit]:
        return edits_of(one, self._model, self._rows, self._sources, self._recipe.prompt_of(self._model))

    def _expert_sets(self, one: Intervention, n: int, seed: int) -> list[tuple[tuple[int, int], ...]]:
        load = np.nan_to_num(load_of(routed_slots(self._model, self._rows, generated_tokens(self._model))))
        sets = matched_sets(load, list(one.cells), n, seed)
        if len(sets) < MIN_CONTROLS:
            raise InputError(
                f"fewer than {MIN_CONTROLS} random sets have the load of the experts of {one.kind!r}: choose fewer "
                "experts, or --controls 0"
            )
        return [tuple(cells) for cells in sets]

    def _head_sets(self, one: Intervention, n: int, seed: int) -> list[tuple[int, ...]]:
        others = sorted(set(range(self._model.cfg.n_heads)) - set(one.heads))
        size = len(set(one.heads))
        if comb(len(others), size) < n:
            raise InputError(
                f"there are fewer than {n} sets of {size} other heads than those of {one.kind!r}: choose fewer heads, "
                "or --controls 0"
            )
        random, drawn = np.random.default_rng(seed), dict[tuple[int, ...], None]()
        while len(drawn) < n:
            drawn[tuple(sorted(map(int, random.choice(others, size, replace=False))))] = None
        return list(drawn)

    def _directions(self, one: Intervention, n: int, seed: int) -> list[list[Edit]]:
        prompt = self._recipe.prompt_of(self._model)
        vectors = vectors_of(one, self._model, self._rows, self._sources, prompt)
        tokens = one.scope.token_set(self._model.tokenizer)
        drawn = {
            point: random_directions(vector, n, seed + 1000 * i) for i, (point, vector) in enumerate(vectors.items())
        }
        return [
            [steer(point, directions[i], one.strength, tokens) for point, directions in drawn.items()] for i in range(n)
        ]
