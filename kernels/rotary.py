"""Rotary positions: turn the pairs (i, i + d_head / 2) of a head by their position's angle.

Reference: Su et al. 2021, arXiv 2104.09864; openai/gpt-oss, gpt_oss/torch/model.py, _apply_rotary_emb.
Cost: reads and writes each activation once, and the angles once for all heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.kernels import cpu, dispatch
from workbench.kernels.chunking import chunked


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "batch pos half"],
    sin: Float[Tensor, "batch pos half"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Return the rotated heads in x's dtype, computed in at least float32."""
    if (gpu := dispatch.triton("rotary", x)) and dispatch.without_gradient(x):
        return gpu.rotate(x, cos, sin)
    if (positions := cpu.position_steps(x)) and cpu.compiled(cos, sin) and positions.covers_rotation(x.shape[-1]):
        return positions.rotate(x, cos, sin)
    return chunked(_rotate, x, cos, sin, dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, -1)
    cos, sin = cos[..., None, :].to(wide), sin[..., None, :].to(wide)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
