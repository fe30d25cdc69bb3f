"""Hook points that cost no time until they are hooked.

The model's fast paths never materialise, say, an attention pattern. They ask `hooked(point)` first, and take
the path that has the tensor only when a hook is waiting for it.

Reference: TransformerLens' HookPoint, of which these are instances; names and shapes are its own where it has them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.errors import InputError


class CheckedHookPoint(HookPoint):
    """A hook point whose hooks keep the shape of the activation: another one would be broadcast to wrong results."""

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the activation [...] as the hooks leave it.

        Raises:
            InputError: a hook returned no tensor, or one of another shape.
        """
        edited = super().__call__(activation)
        if edited is activation:
            return activation
        if not isinstance(edited, Tensor):
            raise InputError(f"a hook at {self.name} returned {type(edited).__name__}: return a tensor, or None")
        if edited.shape != activation.shape:
            raise InputError(
                f"a hook at {self.name} returned shape {list(edited.shape)}, and the activation has "
                f"{list(activation.shape)}: return a tensor of the same shape, or None"
            )
        return edited


def check_experts(point: HookPoint, experts: Tensor, num_experts: int) -> None:
    """Check that experts [... slot] which a hook left, of whatever dtype, can select rows of the weights.

    Raises:
        InputError: an expert is no whole number, or not one of the layer's.
    """
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise InputError(f"a hook at {point.name} returned {experts.dtype}: experts are whole numbers")
    if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts:
        raise InputError(
            f"a hook at {point.name} selected the experts {int(experts.min())} to {int(experts.max())}; the layer has "
            f"0 to {num_experts - 1}"
        )


def checked_experts(
    point: HookPoint, own: Int[Tensor, "batch pos slot"], num_experts: int
) -> Int[Tensor, "batch pos slot"]:
    """Return the experts that the hooks of a point leave, which select rows of the weights without another check.

    On a GPU only what a hook returned is checked, so that recorders do not wait for it.

    Raises:
        InputError: an expert is no whole number, or not one of the layer's.
    """
    experts: Tensor = point(own)
    if experts is own and not (point.fwd_hooks and own.device.type == "cpu"):
        return experts
    check_experts(point, experts, num_experts)
    return experts


def hooked(*points: HookPoint) -> bool:
    """Return whether any of the points has a forward or backward hook."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


_KEPT_BY_TORCH = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks")
_KEPT_BY_LENS = ("fwd_hooks", "bwd_hooks")


def snapshot_hooks(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return the hooks that the points of a module have now, so that they can be restored later."""
    points = [point for point in module.modules() if isinstance(point, HookPoint)]
    then = [{name: copy(getattr(point, name)) for name in (*_KEPT_BY_TORCH, *_KEPT_BY_LENS)} for point in points]

    @contextmanager
    def again() -> Iterator[None]:
        now = [{name: getattr(point, name) for name in hooks} for point, hooks in zip(points, then, strict=True)]
        _put(points, then)
        try:
            yield
        finally:
            _put(points, now)

    return again


def _put(points: list[HookPoint], hooks: list[dict[str, Any]]) -> None:
    for point, own in zip(points, hooks, strict=True):
        for name, value in own.items():
            setattr(point, name, value)


def recomputing() -> bool:
    """Return whether this forward pass recomputes inside a backward one (checkpointing), which runs every hook twice.

    An edit has to act both times. What counts or records must not.
    """
    return torch._C._current_graph_task_id() != -1
