"""MXFP4 on the GPU: the codec, and the packed operand of the matmul kernels.

A group is 32 values: 16 bytes and one scale byte. Strides of a packed matrix count groups, so one set addresses both
tensors, and the compiler sees that every address of the bytes is a multiple of 16. A matmul kernel walks the matrix in
tiles, addressed by four strides (expert, tile row, tile column, row). The layout is that of the checkpoint: it needs no
second copy in memory, serves every tile shape and the transposed products, and a row of a tile consists of complete
32-byte sectors.

Reference: OCP Microscaling Formats (MX) Specification v1.0; `workbench.kernels.mxfp4`, whose results these equal.
Cost: 17 bytes read and 64 written (bfloat16) per group to dequantise; 128 read (float32) and 17 written to quantise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import INTERPRETED, dot, narrow, on_device_of_first
from workbench.kernels.mxfp4 import GROUP, Mxfp4

_INTERPRETED = tl.constexpr(INTERPRETED)
TRITON_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Operand(NamedTuple):
    """What a matmul kernel needs to know about a stack of packed matrices [expert, out, columns]."""

    blocks: Tensor
    scales: Tensor
    out: int
    columns: int
    strides: tuple[int, ...]  # in groups: expert, tile row, tile column, row


@triton.jit
def power(exponent):
    """Return 2^exponent in float32, from the bits: subnormal below -126, zero below -149, infinite above 127."""
    normal = (tl.clamp(exponent.to(tl.float32), -127.0, 128.0).to(tl.int32) + 127) << 23
    tiny = tl.where(exponent < -149, 0, 1 << tl.minimum(tl.maximum(exponent + 149, 0), 22))
    return tl.where(exponent < -126, tiny, normal).to(tl.float32, bitcast=True)


@triton.jit
def unpack(blocks, scales, dtype: tl.constexpr):
    """Return values [rows, columns] of bytes [rows, columns/2] and scales [rows, columns/32], exact in bfloat16."""
    rows: tl.constexpr = blocks.shape[0]
    groups: tl.constexpr = scales.shape[1]
    codes = tl.join(blocks & 15, blocks >> 4).reshape(rows, groups, 32).to(tl.uint32)
    # The three bits after the sign, placed at the bottom of a float's exponent, are the value times 2^-126.
    values = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    exponent = scales.to(tl.uint32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    return narrow((values * scale[:, :, None]).reshape(rows, groups * 32), dtype)


@triton.jit
def load_tile(
    blocks, scales, group, i, j, stride_tile_row, stride_tile_column, stride_row,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return tile (i, j) of the matrix at `group`: bytes [BLOCK_N, BLOCK_K/2], scales [BLOCK_N, BLOCK_K/32].

    Rows past the last repeat it, which no mask has to guard; groups past the last are zeros.
    """
    row = tl.arange(0, BLOCK_N)
    if N % BLOCK_N:
        row = tl.minimum(row, N - 1 - i * BLOCK_N)
    group += i * stride_tile_row + j * stride_tile_column
    start = (row * stride_row)[:, None]  # within a tile: 32 bits do, and cost half the registers
    byte = tl.arange(0, BLOCK_K // 2)[None, :]
    column = tl.arange(0, BLOCK_K // 32)[None, :]
    if K % BLOCK_K:
        w = tl.load(blocks + group * 16 + (start * 16 + byte), mask=byte < K // 2 - j * (BLOCK_K // 2), other=0)
        s = tl.load(scales + group + (start + column), mask=column < K // 32 - j * (BLOCK_K // 32), other=0)
    else:
        w = tl.load(blocks + group * 16 + (start * 16 + byte))
        s = tl.load(scales + group + (start + column))
    return w, s


@triton.jit
def dot_packed(x, blocks, scales, acc):
    """Return acc + x · Wᵀ, W a packed tile; bfloat16 on the tensor cores, float32 in full.

    Triton's own mixed product turns bytes into the left operand of wgmma in registers; it reads a NaN scale as
    infinite and the scale 2^-127 as zero. Interpreters before Triton 3.8 lack it, hence this function.
    """
    if _INTERPRETED or x.dtype == tl.float32:
        return dot(x, unpack(blocks, scales, x.dtype).T, acc)
    else:  # not dropped: Triton compiles what follows a return, even a static one
        return tl.dot_scaled(x, None, "bf16", blocks.T, scales, "e2m1", acc, fast_math=True)


@triton.jit
def _dequantise(blocks, scales, out, groups, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    w = tl.load(blocks + group[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
    s = tl.load(scales + group, mask=inside, other=0)
    tl.store(out + group[:, None] * 32 + tl.arange(0, 32)[None, :], unpack(w, s[:, None], DTYPE), mask=inside[:, None])


@triton.jit
def _encode(values, exponent):
    """The 4-bit codes of groups [group, 32] at a scale of 2^exponent, and the squared error they leave."""
    scaled = values * power(-exponent)[:, None]
    size = tl.abs(scaled)
    # Midpoints of the e2m1 values; a tie goes to the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    rounded = (code << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
    error = rounded - size
    sign = (scaled.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    return code | (sign << 3), tl.sum(error * error, 1) * power(2 * exponent)


@triton.jit
def _quantise(weight, blocks, scales, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(weight + at, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    # e2m1's largest value is 1.5 · 2^2: the floor of the scale is two below the exponent of the largest.
    floor = (largest.to(tl.int32, bitcast=True) >> 23) - 127 - 2
    low = tl.where(largest > 0, tl.minimum(tl.maximum(floor, -127), 126), 0)
    narrow_code, narrow_error = _encode(values, low)
    wide_code, wide_error = _encode(values, low + 1)
    widen = wide_error < narrow_error
    code = tl.where(widen[:, None], wide_code, narrow_code)
    first, second = tl.split(code.reshape(BLOCK, 16, 2))
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(blocks + byte, (first | (second << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scales + group, (low + widen.to(tl.int32) + 127).to(tl.uint8), mask=inside)


@on_device_of_first
def dequantise(
    blocks: UInt8[Tensor, "*stack group 16"], scales: UInt8[Tensor, "*stack group"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*stack columns"]:
    """Return the packed values, exact in bfloat16 and float32; above 2^127 they overflow to infinity."""
    blocks, scales = blocks.contiguous(), scales.contiguous()
    out = torch.empty(*scales.shape[:-1], scales.shape[-1] * GROUP, dtype=dtype, device=blocks.device)
    tile, groups = tiles.codec_tile(), scales.numel()
    grid = (triton.cdiv(groups, tile.blocks["BLOCK"]),)
    _dequantise[grid](blocks, scales, out, groups, TRITON_TYPES[dtype], **tile.blocks, **tile.options)
    return out


@on_device_of_first
def quantise(
    weight: Float[Tensor, "*stack columns"],
) -> tuple[UInt8[Tensor, "*stack group 16"], UInt8[Tensor, "*stack group"]]:
    """Return the nearest packed values (ties to the even code) at the better of two scales, blocks and scales.

    Where the errors of the two scales differ by less than float32's rounding of their sums, either may be taken.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"MXFP4 packs groups of {GROUP} columns, got {weight.shape[-1]} columns")
    if not torch.isfinite(weight).all():
        raise ValueError("MXFP4 cannot hold NaN or infinity: the weight to quantise has some")
    weight = weight.detach().contiguous()
    scales = torch.empty(*weight.shape[:-1], weight.shape[-1] // GROUP, dtype=torch.uint8, device=weight.device)
    blocks = torch.empty(*scales.shape, 16, dtype=torch.uint8, device=weight.device)
    tile, groups = tiles.codec_tile(), scales.numel()
    grid = (triton.cdiv(groups, tile.blocks["BLOCK"]),)
    # A fused multiply-add would round the squared errors unlike torch, and flip near-equal choices of the scale.
    _quantise[grid](
        weight, blocks, scales, groups, **tile.blocks, **tile.options, enable_fp_fusion=False
    )  # fmt: skip
    return blocks, scales


def operand(weight: Mxfp4, rows: int, columns: int) -> Operand:
    """Return how a kernel with tiles of `rows` by `columns` reads a stack of packed matrices."""
    blocks, scales = weight.blocks, weight.scales
    if not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError("packed weights must be contiguous: call .contiguous() once when loading")
    _, out, groups = scales.shape
    return Operand(blocks, scales, out, groups * GROUP, (out * groups, rows * groups, columns // GROUP, groups))
