"""Edits of any activation: steer, replace, patch, resample; see `workbench.hooks.interventions`."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from workbench.errors import InputError
from workbench.hooks.edits import Act, At, Edit, Tokens, as_set
from workbench.hooks.targets import along, at_points, listed, over_axes, points_of


def steer(
    points: str | Collection[str], direction: Float[Tensor, " d"], scale: float = 1.0, tokens: Tokens = None
) -> Edit:
    """Return an edit that adds scale · direction to these hook points; the direction is not normalized.

    Raises:
        InputError: the direction does not fit the activations of a hook point.
    """
    members = as_set(tokens)

    def act(x: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        if direction.shape != x.shape[-1:]:
            raise InputError(
                f"a direction of {tuple(direction.shape)} does not fit activations of {tuple(x.shape)}: "
                "expected their last axes"
            )
        selected = at.selected(members)
        mask = over_axes(selected, x)
        return torch.where(mask, x + (scale * direction).to(x.device, x.dtype), x), int(selected.sum()), selected.sum()

    return Edit(f"steer {listed(points)} by {scale:g}", at_points(points, act))


def replace(
    points: str | Collection[str],
    value: Tensor | float,
    tokens: Tokens = None,
    index: int | Collection[int] | None = None,
) -> Edit:
    """Return an edit that replaces the activation by a value: a mean for mean ablation, 0.0 for zero ablation.

    value: of the shape that follows [batch pos], or its last axes. index: along the axis after pos (heads, slots),
    only these.

    Raises:
        InputError: the value does not fit the activations of a hook point.
    """
    members = as_set(tokens)

    def act(x: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        selected = at.selected(members)
        mask = over_axes(selected, x) & along(index, x)
        new = torch.as_tensor(value).to(x.device, x.dtype)
        if new.dim() and new.shape != x.shape[max(2, x.dim() - new.dim()) :]:
            raise InputError(f"a value of {tuple(new.shape)} does not fit activations of {tuple(x.shape)}")
        return torch.where(mask, new, x), int(selected.sum()), selected.sum()

    return Edit(f"replace {listed(points)}", at_points(points, act))


def patch(
    points: str | Collection[str],
    source: Mapping[str, Tensor] | ActivationCache | Float[Tensor, "batch pos *feature"],
    tokens: Tokens = None,
    index: int | Collection[int] | None = None,
    *,
    shift: int = 0,
) -> Edit:
    """Return an edit that replaces activations [batch pos ...] by those of another pass, position by position.

    source: a cache, or a tensor for the one point. Sequence i takes row i, or the only row; the token at position p
    takes position p + shift, and keeps its own where the source has none. Of scores and patterns, query by query.

    Raises:
        InputError: the source has other shapes or fewer sequences than the pass.
    """
    members = as_set(tokens)

    def act(x: Tensor, at: At, name: str) -> tuple[Tensor, int, Tensor]:
        square = name.endswith(("hook_attn_scores", "hook_pattern"))
        there = source if isinstance(source, Tensor) else source[name]
        here, there = (x.movedim(2, 1), there.movedim(2, 1)) if square else (x, there)
        if square and there.shape[-1] < here.shape[-1]:
            raise InputError(
                f"{name}: the source has {there.shape[-1]} keys, this pass {here.shape[-1]}: use equal lengths"
            )
        there = there[..., : here.shape[-1]] if square else there
        if there.shape[2:] != here.shape[2:]:
            raise InputError(f"{name}: source {tuple(there.shape)} does not fit activations of {tuple(x.shape)}")
        position, sequence = at.context.positions.cpu() + shift, at.context.sequence.clamp(min=0)
        if len(there) != 1 and int(sequence.max()) >= len(there):
            raise InputError(
                f"{name}: the source has {len(there)} rows, this pass {int(sequence.max()) + 1} sequences: "
                "give one row, or one for each"
            )
        selected = at.selected(members) & (position >= 0) & (position < there.shape[1])
        rows = sequence if len(there) > 1 else torch.zeros_like(sequence)
        new = there[rows.to(there.device), position.clamp(0, there.shape[1] - 1).to(there.device)]
        mask = over_axes(selected, here) & along(index, here)
        out = torch.where(mask, new.to(here.device, here.dtype), here)
        return out.movedim(1, 2) if square else out, int(selected.sum()), selected.sum()

    def on(model: Any) -> list[tuple[str, Act]]:
        return [(name, partial(act, name=name)) for name in points_of(model, points)]

    return Edit(f"patch {listed(points)}", on)


def resample(
    points: str | Collection[str], donors: Float[Tensor, "donor *feature"], tokens: Tokens = None, *, seed: int = 0
) -> Edit:
    """Return an edit that gives every selected token the activation of a random donor: resample ablation.

    The draw belongs to a token's sequence and position, so that batches and decode steps draw alike.

    Raises:
        InputError: the donors do not fit the activations of a hook point.
    """
    members = as_set(tokens)

    def act(x: Tensor, at: At) -> tuple[Tensor, int, Tensor]:
        if donors.shape[1:] != x.shape[2:]:
            raise InputError(f"donors of {tuple(donors.shape[1:])} do not fit activations of {tuple(x.shape)}")
        selected = at.selected(members)
        drawn = _drawn(at.context.sequence, at.context.positions.cpu(), len(donors), seed)
        new = donors[drawn.to(donors.device)].to(x.device, x.dtype)
        return torch.where(over_axes(selected, x), new, x), int(selected.sum()), selected.sum()

    return Edit(f"resample {listed(points)} from {len(donors)} donors", at_points(points, act))


def _drawn(
    sequence: Int[Tensor, "batch pos"], position: Int[Tensor, "batch pos"], n: int, seed: int
) -> Int[Tensor, "batch pos"]:
    """Return a number below n for every token, from its sequence and position; splitmix64."""
    with np.errstate(over="ignore"):
        z = sequence.numpy().astype(np.uint64) * np.uint64(2**32) + position.numpy().astype(np.uint64)
        z = (z + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z % np.uint64(n)).astype(np.int64))
