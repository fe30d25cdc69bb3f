"""MXFP4, the format of the expert weights: 32 values of 4 bits share one power-of-two scale.

A group of 32 values along a matrix's *input* dimension is 16 bytes (consecutive pairs, low nibble first)
and one scale byte: value = e2m1(nibble) · 2^(scale − 127). Scale 255 is NaN.

Reference: OCP Microscaling Formats (MX) Specification v1.0, section 5 and table 6.
Cost of a dequantised matrix: 17 bytes read and 64 bytes (bfloat16) written per group.
Measured, one thread (Zen 4), 5760 × 2880: 7 ms in chunks of 256 rows, 1 ms by the compiled loop of `kernels.cpu`, with
which a product with 64 rows takes no longer than torch takes for an unpacked matrix (12.5 ms); 48 ms unpacked as a
whole into new memory.
"""

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from workbench.kernels import cpu, dispatch

GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK, _WIDE_CHUNK = 256 * 2880, 96 * 2880  # unpacked values at a time, in bfloat16 and in float32
_EMAX = 2  # the largest e2m1 value is 1.5 · 2^2


class Mxfp4(NamedTuple):
    """A packed matrix or a stack of them, `out` rows by `group · 32` columns; index it to pick one of the stack."""

    blocks: Shaped[Tensor, "*stack out group 16"]
    scales: Shaped[Tensor, "*stack out group"]

    def at(self, index: int) -> "Mxfp4":
        """Return one matrix of the stack, without a copy."""
        return Mxfp4(self.blocks[index], self.scales[index])


@functools.cache
def _table(device: torch.device) -> Int[Tensor, "65536"]:
    """Scale and byte (scale · 256 + byte) → the byte's two values in bfloat16, as one int32: one lookup moves both.

    256 KiB, of which the few scales that a matrix has stay in cache. The subnormal 2^-127 and the NaN of scale 255
    are in it.
    """
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.bfloat16)
    byte = torch.arange(256)
    scale = torch.ldexp(torch.ones(256), byte - 127).where(byte < 255, torch.nan).to(torch.bfloat16)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1) * scale[:, None, None]
    return pairs.view(torch.int32).flatten().to(device)


def dequantise(
    blocks: UInt8[Tensor, "*stack group 16"], scales: UInt8[Tensor, "*stack group"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*stack columns"]:
    """Return the packed values, exact in bfloat16 and wider (above 2^127 they overflow to infinity, as in bfloat16)."""
    if gpu := dispatch.triton("mxfp4", blocks):
        return gpu.dequantise(blocks, scales, dtype)
    values = torch.empty(*blocks.shape[:-2], blocks.shape[-2] * GROUP, dtype=torch.bfloat16, device=blocks.device)
    _unpack(blocks, scales, values, torch.empty(blocks.shape, dtype=torch.int32, device=blocks.device))
    return values.to(dtype)


def _unpack(blocks: Tensor, scales: Tensor, values: Tensor, entry: Tensor) -> None:
    """Write `dequantise` into `values`, by way of an int32 tensor of at least the blocks' shape."""
    entry = torch.add(blocks, (scales.int() << 8)[..., None], out=entry[: len(blocks)])
    torch.index_select(_table(blocks.device), 0, entry.flatten(), out=values.view(torch.int32).flatten())


def quantise(
    weight: Float[Tensor, "*stack columns"],
) -> tuple[UInt8[Tensor, "*stack group 16"], UInt8[Tensor, "*stack group"]]:
    """Return the nearest packed values (ties to the even code), blocks and scales.

    Of the two scales that can hold a group's largest magnitude, the specification's floor, which saturates
    above 6, and the next power of two, the one with the smaller squared error is taken.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"MXFP4 packs groups of {GROUP} columns, got {weight.shape[-1]} columns")
    if gpu := dispatch.triton("mxfp4", weight):
        return gpu.quantise(weight)
    groups = weight.detach().float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise ValueError("MXFP4 cannot hold NaN or infinity: the weight to quantise has some")
    floor = torch.frexp(largest).exponent - 1 - _EMAX
    low = floor.where(largest > 0, 0).clamp(-127, 126)
    codes, errors = zip(*(_encode(groups, exponent) for exponent in (low, low + 1)), strict=True)
    widen = errors[1] < errors[0]
    code = torch.where(widen[..., None], codes[1], codes[0])
    blocks = code[..., 0::2] | (code[..., 1::2] << 4)
    return blocks, (low + widen.int() + 127).to(torch.uint8)


def _encode(groups: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 4-bit codes of `groups` at a scale of 2^exponent, and the squared error they leave."""
    scaled = torch.ldexp(groups, -exponent[..., None])
    # Midpoints between the e2m1 values; those that must round up to the even code are one ulp lower.
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=groups.device)
    edges[1::2] = torch.nextafter(edges[1::2], torch.zeros_like(edges[1::2]))
    code = torch.bucketize(scaled.abs(), edges)
    rounded = torch.tensor(E2M1, device=groups.device)[code].copysign(scaled)
    error = torch.ldexp((rounded - scaled).square().sum(-1), 2 * exponent)
    return (code | (torch.signbit(scaled) << 3)).to(torch.uint8), error


class _PackedLinear(torch.autograd.Function):
    """x · Wᵀ from packed W, with a gradient for x that unpacks again instead of keeping W."""

    @staticmethod
    def forward(ctx, x: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(blocks, scales)
        if (tiles := cpu.many_rows(x, blocks, scales)) and tiles.covers_packed(blocks, scales):
            return tiles.packed_linear(x, Mxfp4(blocks, scales))
        out = x.new_empty(x.shape[0], blocks.shape[0])
        inputs = x.to(cpu.product_dtype(x))
        for start, rows in _row_chunks(blocks, scales, inputs.dtype):
            out[:, start : start + len(rows)] = inputs @ rows.mT
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return input_gradient(grad, *ctx.saved_tensors), None, None


def input_gradient(
    grad: Float[Tensor, "rows out"], blocks: UInt8[Tensor, "out group 16"], scales: UInt8[Tensor, "out group"]
) -> Float[Tensor, "rows columns"]:
    """Return the gradient of the inputs of `linear` from that of its outputs."""
    wide = grad.to(cpu.product_dtype(grad))
    total = wide.new_zeros(wide.shape[0], blocks.shape[1] * GROUP)
    for start, rows in _row_chunks(blocks, scales, wide.dtype):
        total += wide[:, start : start + len(rows)] @ rows
    return total.to(grad.dtype)


def _row_chunks(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the matrix a few rows at a time, in cache when the matmul reads them; the next overwrite them."""
    products = cpu.compiled(blocks, scales)
    if products and not products.covers_unpacking(blocks, scales):
        products = None
    if products and dtype == torch.float32 and len(blocks) % 16 == 0:
        yield from _column_chunks(blocks, scales, products)
        return
    columns = blocks.shape[1] * GROUP
    step = max(1, _CHUNK // columns)
    # Used again for every chunk: asking the system for new pages costs more than unpacking into them.
    values = torch.empty(step, columns, dtype=torch.bfloat16, device=blocks.device)
    if products:
        unpack = products.unpack
    else:
        entry = torch.empty(step, *blocks.shape[1:], dtype=torch.int32, device=blocks.device)
        unpack = functools.partial(_unpack, entry=entry)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        rows = values[: len(some)]
        unpack(some, scales[start : start + step], rows)
        yield start, rows.to(dtype)


def _column_chunks(blocks: Tensor, scales: Tensor, products: ModuleType) -> Iterator[tuple[int, Tensor]]:
    """As `_row_chunks` in float32, but the rows are views of columns in memory."""
    columns = blocks.shape[1] * GROUP
    step = max(16, _WIDE_CHUNK // columns // 16 * 16)
    memory = torch.empty(step * columns)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        values = memory[: len(some) * columns].view(columns, len(some))
        products.unpack_columns(some, scales[start : start + step], values)
        yield start, values.mT


def linear(x: Float[Tensor, "rows columns"], weight: Mxfp4 | Float[Tensor, "columns out"]) -> Float[Tensor, "rows out"]:
    """Return x times a weight matrix, packed (stored by rows of outputs) or dense (stored inputs by outputs)."""
    if isinstance(weight, Mxfp4):
        return _PackedLinear.apply(x, weight.blocks, weight.scales)
    return x @ weight
