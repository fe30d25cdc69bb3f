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
from torch import nn
from transformer_lens.hook_points import HookPoint


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
