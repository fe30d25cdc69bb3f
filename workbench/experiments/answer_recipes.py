"""Recipes at several doses, and random ones of the same kind and dose: of a group's experts, or along a direction."""

from collections.abc import Sequence

import numpy as np
import torch

from workbench.errors import InputError
from workbench.experiments.effects import load_of, routed_slots
from workbench.experiments.expert_sets import Cells, group_of, matched_sets, named_experts
from workbench.experiments.final_channel import generated_tokens
from workbench.experiments.random_controls import MIN_CONTROLS
from workbench.experiments.steering import channel_direction, random_directions
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import forbid, reweight, steer
from workbench.model.transformer import GptOss

# Recipes by name, random recipes for each, and a description.
Recipes = tuple[dict[str, list[Edit]], dict[str, list[list[Edit]]], dict[str, str]]


def read_doses(text: str | float) -> list[float]:
    """Return the doses of a text such as "0,0.5,2".

    Raises:
        InputError: a part is not a finite number, or two are equal.
    """
    try:
        doses = [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise InputError(f"doses={text!r}: expected numbers separated by commas, such as 0,0.5,2") from error
    if len(set(doses)) < len(doses) or not np.isfinite(doses).all():
        raise InputError(f"doses={text!r}: expected different finite numbers")
    return doses


def expert_recipes(
    model: GptOss, rows: Sequence[Transcript], group: str, doses: Sequence[float], n: int, seed: int
) -> Recipes:
    """Return changes of the experts of a group of sequences: masked at dose 0, gate weights times the dose otherwise.

    Raises:
        InputError: there is one group only or not this one, a dose is negative, or no sets of equal load exist.
    """
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


def direction_recipes(model: GptOss, rows: Sequence[Transcript], doses: Sequence[float], n: int, seed: int) -> Recipes:
    """Return steering along the channel direction in the middle of the model at each dose."""
    point = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    direction = channel_direction(model, rows, point)
    random = random_directions(direction, n, seed)
    written = token_set(tokenizer=model.tokenizer, role="assistant")

    def edits(vector: torch.Tensor, dose: float) -> list[Edit]:
        return [steer(point, vector, dose, written)]

    recipes = {f"{dose:+g} × (final − analysis)": edits(direction, dose) for dose in doses}
    null = {name: [edits(v, dose) for v in random] for name, dose in zip(recipes, doses, strict=True)}
    return recipes, null, {"what": f"steering along the channel direction at {point}"}
