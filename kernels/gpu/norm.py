"""RMSNorm on the GPU: one program a row, and its scale as a kernel of its own for hooks.

Division and square root are rounded as IEEE 754 specifies. The fused result therefore equals, bit for bit, what a
hooked model computes with the scale of `rms_scale` in separate steps: recording the scale does not change the model.

Reference: `workbench.kernels.norm`.
Cost: reads a row once and writes it once.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import INTERPRETED, narrow, on_device_of_first

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _scale_of(values, eps, D: tl.constexpr):
    """√(Σ values² / D + eps), correctly rounded; the interpreter's operations are NumPy's, which round so."""
    mean = tl.sum(values * values, 0) / D if _INTERPRETED else tl.div_rn(tl.sum(values * values, 0), D * 1.0)
    return tl.sqrt(mean + eps) if _INTERPRETED else tl.sqrt_rn(mean + eps)


@triton.jit
def _rms_norm(x, weight, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = d < D
    values = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    scale = _scale_of(values, eps, D)
    unit = values / scale if _INTERPRETED else tl.div_rn(values, scale)
    scaled = unit * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, narrow(scaled, out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_scale(x, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    values = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + row, _scale_of(values, eps, D))


@on_device_of_first
def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """Return x / rms(x) · weight in x's dtype."""
    x, tile = x.contiguous(), tiles.norm_tile(x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows := x.numel() // x.shape[-1]:
        _rms_norm[(rows,)](x, weight, out, eps, x.shape[-1], **tile.blocks, **tile.options)
    return out


@on_device_of_first
def rms_scale(x: Float[Tensor, "*batch d"], eps: float) -> Float[Tensor, "*batch 1"]:
    """Return √(mean of squares + eps) of each row in float32, as `rms_norm` uses it."""
    x, tile = x.contiguous(), tiles.norm_tile(x.shape[-1])
    out = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if rows := out.numel():
        _rms_scale[(rows,)](x, out, eps, x.shape[-1], **tile.blocks, **tile.options)
    return out
