"""Passes that bring activations and gradients at hook points, and what the axes of a hook point mean.

Gradients are those of a zero added at the point, so that several points are had from one pass, and weights take none.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.names import BLOCK, hook_points
from workbench.hooks.targets import points_of
from workbench.model.transformer import GptOss

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]
Hook = Callable[..., Tensor | None]
_SUMMED = ("d_model", "d_head", "d_mlp", "d_vocab", "key_pos", "1")
_DIMS = {"batch": "sequence", "pos": "position", "query_pos": "position"}


@torch.no_grad()
def activations(
    model: GptOss, tokens: Int[Tensor, "batch pos"], names: Collection[str], n_real: Sequence[int] | None = None
) -> dict[str, Shaped[Tensor, "batch *feature"]]:
    """Return the activations at these hook points, after all edits."""
    values: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[(name, record_hook(values)) for name in dict.fromkeys(names)]):
        model(tokens.to(model.device), n_real=n_real)
    return values


def slopes(
    model: GptOss, tokens: Tensor, metric: Metric, names: Sequence[str], n_real: Sequence[int] | None = None
) -> tuple[Float[Tensor, " batch"], dict[str, Tensor], dict[str, Tensor]]:
    """Return the metric of tokens [batch pos], activations at hook points [batch pos ...], and gradients there."""
    here: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def add(x: Tensor, hook: Any) -> Tensor:
        here[hook.name] = x.detach()
        deltas[hook.name] = torch.zeros_like(here[hook.name], requires_grad=True)
        return x + deltas[hook.name]

    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, add) for name in names]):
        values = scalar(metric, model(tokens.to(model.device), n_real=n_real))
        grads = torch.autograd.grad(values.sum(), [deltas[name] for name in names], materialize_grads=True)
    return values.detach(), here, dict(zip(names, grads, strict=True))


@torch.no_grad()
def metric_value(
    model: GptOss, tokens: Int[Tensor, "batch pos"], metric: Metric, n_real: Sequence[int] | None = None
) -> Float[Tensor, " batch"]:
    """Return the metric of a pass."""
    return scalar(metric, model(tokens.to(model.device), n_real=n_real))


def scalar(metric: Metric, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
    """Return the metric as one number for each sequence.

    Raises:
        InputError: the metric has another shape than [sequence].
    """
    values = metric(logits)
    if values.shape != logits.shape[:1]:
        raise InputError(
            f"the metric returns values of shape {tuple(values.shape)} for {len(logits)} sequences: "
            "expected a number for each"
        )
    return values


def record_hook(values: dict[str, Tensor]) -> Hook:
    """Return a hook that stores the activation [batch pos ...] by the name of its hook point."""

    def look(x: Tensor, hook: Any) -> None:
        values[hook.name] = x.detach()

    return look


def replace_hook(value: Tensor) -> Hook:
    """Return a hook that replaces the activation by `value` [batch pos ...]."""
    return lambda x, hook: value


def choices(model: GptOss) -> list[str]:
    """Return the points of the choice of experts, a layer each."""
    return [f"blocks.{layer}.mlp.hook_expert_indices" for layer in range(model.cfg.n_layers)]


def flipped(
    mine: Int[Tensor, "batch pos slot"], other: Int[Tensor, "batch pos slot"]
) -> Float[np.ndarray, "batch pos"]:
    """Return the share of my slots whose expert the other did not choose."""
    lost = ~(mine[..., :, None] == other.to(mine.device)[..., None, :]).any(-1)
    return lost.double().mean(-1).cpu().numpy()


def hook_names(model: GptOss, point: str) -> list[str]:
    """Return the full names of a hook point of the blocks in every layer, or of one hook point.

    Raises:
        InputError: the hook point is a choice of experts, which has no gradient.
    """
    names = [f"blocks.{layer}.{point}" for layer in range(model.cfg.n_layers)] if point in BLOCK else [point]
    if any(name.endswith("hook_expert_indices") for name in names):
        raise InputError(f"{point}: a choice of experts has no gradient: measure its effect by patching")
    return points_of(model, names)


def axes(model: GptOss, name: str) -> list[str]:
    """Return the axes of a hook point; of an SAE's features each is one's own."""
    other = "batch pos feature" if name.endswith("hook_sae_acts_post") else "batch pos d_model"
    return hook_points(model.cfg.n_layers).get(name, other).split()


def dims(model: GptOss, name: str) -> tuple[str, ...]:
    """Return the axes that remain when the entries of a vector are summed, as dimensions of a dataset."""
    return tuple(_DIMS.get(axis, axis) for axis in axes(model, name) if axis not in _SUMMED)


def dot(model: GptOss, name: str, end: Tensor, begin: Tensor, slope: Tensor) -> Float[np.ndarray, "batch *kept"]:
    """Return (end − begin) · slope of [batch pos ...], summed over feature axes; equal or infinite entries count 0."""
    wide = torch.promote_types(slope.dtype, torch.float32)
    end = end.to(begin.device)
    share = torch.where(end == begin, 0, end.to(wide) - begin.to(wide)) * slope.to(wide)
    summed = axes(model, name)[-1] in _SUMMED
    return (share.sum(-1) if summed else share).double().cpu().numpy()


def real(tokens: Int[Tensor, "batch pos"], n_real: Sequence[int] | None) -> Bool[np.ndarray, "batch pos"]:
    """Return which tokens are not padding."""
    lengths = np.array([tokens.shape[1]] * len(tokens) if n_real is None else n_real)
    return np.arange(tokens.shape[1]) < lengths[:, None]


def source(
    model: GptOss,
    like: Tensor,
    given: Tensor | Mapping[str, Tensor],
    names: Sequence[str],
    n_real: Sequence[int] | None,
) -> Mapping[str, Tensor]:
    """Return activations [batch pos ...] by full name: those of tokens of the same shape, or the given ones.

    Raises:
        InputError: the shapes of the tokens differ, or an activation is missing.
    """
    if isinstance(given, Tensor):
        if given.shape != like.shape:
            raise InputError(
                f"clean tokens of {tuple(given.shape)} and corrupt ones of {tuple(like.shape)}: pad both to one length"
            )
        return activations(model, given, [*names, *choices(model)], n_real)
    if missing := [name for name in names if name not in given]:
        raise InputError(f"the clean activations lack {missing[0]!r}: record it, or give tokens")
    return given
