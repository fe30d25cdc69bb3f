"""Rotary positions on the GPU: one program for all heads of a token, so that the angles are read once.

Reference: `workbench.kernels.rotary`.
Cost: reads and writes every activation once, and 8 bytes of angle a token and pair.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import narrow, on_device_of_first


@triton.jit
def _rotate(x, cos, sin, out, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    token, head, i = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (head < HEADS)[:, None] & (i < HALF)[None, :]
    at = (token * HEADS + head)[:, None] * (2 * HALF) + i[None, :]
    c = tl.load(cos + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(a * c - b * s, out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, narrow(b * c + a * s, out.dtype.element_ty), mask=inside)


@on_device_of_first
def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "batch pos half"],
    sin: Float[Tensor, "batch pos half"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Return the rotated heads in x's dtype, computed in float32."""
    x, heads, half = x.contiguous(), x.shape[2], x.shape[3] // 2
    cos, sin = (t.expand(*x.shape[:2], half).contiguous() for t in (cos, sin))
    out, tile = torch.empty(x.shape, dtype=x.dtype, device=x.device), tiles.rotary_tile(heads, half)
    if tokens := x.shape[0] * x.shape[1]:
        _rotate[(tokens,)](x, cos, sin, out, heads, half, **tile.blocks, **tile.options)
    return out
