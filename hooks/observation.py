"""Hooks on tensors that the fused path does not compute: reading them never changes the model, editing them does.

A fused kernel rounds once where a path with every intermediate tensor rounds several times, so the two differ in the
last bits of bfloat16. Both are therefore computed at a hooked point, and the result of the fused path is replaced only
where a hook changed a value. Nothing here copies a value to the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.hook_points import HookPoint


def observe(point: HookPoint, x: Tensor, recompute: Callable[[], Tensor]) -> tuple[Tensor, Bool[Tensor, "..."] | None]:
    """Return x [batch pos ...] as the hooks leave it, and which values they changed (None: they only read it).

    `recompute` returns the values of x again; it is called where a hook may have edited x in place.
    """
    version = None if x.is_inference() else x._version  # inference tensors count no versions
    out = point(x)
    untouched = version is not None and x._version == version
    if untouched and out is x:
        return out, None
    with torch.no_grad():
        return out, out != (x if untouched else recompute())


def replace_changed(
    fused: Tensor, materialized: Callable[[], Tensor], changed: Bool[Tensor, "..."] | None, *sources: Tensor
) -> Tensor:
    """Return `fused` [batch pos ...], with the values of `materialized()` where `changed`; it carries the gradients.

    changed: broadcast against `fused`; None stands for nowhere. sources: tensors after their hooks; when one of them
    has a gradient, the materialized path is computed even if nothing changed, for the gradient to reach that tensor.
    """
    graph = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if changed is None and not graph:
        return fused
    path = materialized()
    value = fused if changed is None else torch.where(changed, path.detach(), fused)
    return _ValueWithGradient.apply(value.detach(), path) if graph else value


def either(*changed: Bool[Tensor, "..."] | None) -> Bool[Tensor, "..."] | None:
    """Return the union of the masks; None stands for a mask that is nowhere true."""
    masks = [mask for mask in changed if mask is not None]
    out = masks[0] if masks else None
    for mask in masks[1:]:
        out = mask if out is None else out | mask
    return out


class _ValueWithGradient(torch.autograd.Function):
    """The first argument's values with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]
