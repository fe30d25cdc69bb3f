"""Long prompts a few positions at a time, where the way is wider than what comes out.

A step that widens bfloat16 to float32 and makes three tensors of it on the way would need more memory than the model
on 65,536 tokens; a thousand at a time it needs megabytes, which stay in cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

POSITIONS = 1024


def chunked(step: Callable[..., Tensor], *tensors: Tensor, dim: int) -> Tensor:
    """`step(*tensors)`, position by position independent along `dim`, which all the tensors have."""
    if tensors[0].shape[dim] <= POSITIONS:
        return step(*tensors)
    return torch.cat([step(*part) for part in zip(*(t.split(POSITIONS, dim) for t in tensors), strict=True)], dim)
