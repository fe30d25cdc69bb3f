"""RMSNorm: x / rms(x) · weight, in at least float32 until after the weight.

Reference: Zhang and Sennrich 2019, arXiv 1910.07467; openai/gpt-oss, gpt_oss/torch/model.py, RMSNorm.
Cost: reads and writes each activation once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.kernels import cpu, dispatch


def rms_scale(x: Float[Tensor, "*batch d"], eps: float) -> Float[Tensor, "*batch 1"]:
    """Return √(mean of squares + eps) of each row, in at least float32."""
    if (gpu := dispatch.triton("norm", x)) and dispatch.without_gradient(x):
        return gpu.rms_scale(x, eps)
    if (positions := cpu.position_steps(x)) and positions.covers_norm(x.shape[-1]):
        return positions.rms_scale(x, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
    return (square / x.shape[-1] + eps).sqrt()


def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """Return the normalised rows in x's dtype: equal bit for bit to x / rms_scale(x) · weight, cast at the end."""
    if (gpu := dispatch.triton("norm", x)) and dispatch.without_gradient(x, weight):
        return gpu.rms_norm(x, weight, eps)
    if (positions := cpu.position_steps(x, weight)) and positions.covers_norm(x.shape[-1]):
        return positions.rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / rms_scale(x, eps) * weight.to(wide.dtype)).to(x.dtype)
