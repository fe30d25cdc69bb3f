"""Process long prompts in chunks of positions on a CPU, where intermediate values are larger than the result.

A step that widens bfloat16 to float32 and makes three tensors of it on the way would need more memory than the model
on 65,536 tokens; a thousand at a time it needs megabytes, which stay in cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.kernels import dispatch

POSITIONS = 1024


def chunked(step: Callable[..., Tensor], *tensors: Tensor, dim: int) -> Tensor:
    """Return `step(*tensors)`; positions along `dim`, an axis of all tensors [... dim ...], must be independent.

    On a GPU it is one step: every chunk would be a launch, and the caches that chunks are for are a CPU's.
    """
    if tensors[0].shape[dim] <= POSITIONS or dispatch.on_gpu(tensors[0]):
        return step(*tensors)
    return torch.cat([step(*part) for part in zip(*(t.split(POSITIONS, dim) for t in tensors), strict=True)], dim)
