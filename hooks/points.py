"""Hook points that cost nothing until somebody hooks them.

The model's fast paths never materialise, say, an attention pattern. They ask `hooked(point)` first, and take
the path that has the tensor only when a hook is waiting for it.

Reference: TransformerLens' HookPoint, of which these are instances; names and shapes are its own where it has them.
"""

from transformer_lens.hook_points import HookPoint


def hooked(*points: HookPoint) -> bool:
    """Whether any of the points has a forward or backward hook."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)
