"""MXFP4 as ggml stores it, and its exact conversion to the published order.

Published: byte i of a group of 32 values holds value 2i in its low and 2i + 1 in its high nibble; scales are a tensor
of their own. ggml: a block of 17 bytes, the scale first; byte j holds value j in its low and j + 16 in its high nibble.

Cost: 17 bytes read and written for each group. Measured, one thread (Zen 4), where the result has its memory already:
15 GB/s by the compiled loop of `cpu.ggml_loops`, 0.3 GB/s by numpy. New memory costs more than that: see `new_memory`.
"""

import math
import mmap
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from workbench.kernels import cpu, mxfp4
from workbench.kernels.mxfp4 import Mxfp4
from workbench.kernels.parallel import parallel_map

Bytes = npt.NDArray[np.uint8]
_ROWS = 2048  # groups at a time: their copies stay in cache
BLOCK_BYTES = 17
_HUGE = 1 << 24  # bytes from which memory is asked for in huge pages


class GgmlMxfp4(NamedTuple):
    """The packed matrices of all experts as a GGUF file holds them, usually memory-mapped.

    parts: one tensor, or those of gate and up, whose rows are the matrix's in turn. halves: byte j of a group holds
    values j and j + 16, as in ggml, instead of 2j and 2j + 1.
    """

    parts: tuple[UInt8[Tensor, "expert out group 17"], ...]
    halves: bool

    def at(self, index: int) -> Mxfp4:
        """Return the matrix of one expert in the published order, in new memory."""
        _, out, groups, _ = self.parts[0].shape
        rows = out * len(self.parts)
        matrix = Mxfp4(
            torch.empty(rows, groups, BLOCK_BYTES - 1, dtype=torch.uint8), torch.empty(rows, groups, dtype=torch.uint8)
        )
        for first, part in enumerate(self.parts):
            separate(part[index].numpy(), *matrix, first, len(self.parts), reorder=self.halves)
        return matrix

    def published(self) -> Mxfp4:
        """Return the matrices of all experts in the published order, in new memory."""
        experts, out, groups, _ = self.parts[0].shape
        shape = (experts, out * len(self.parts), groups)
        matrices = Mxfp4(new_memory((*shape, BLOCK_BYTES - 1)), new_memory(shape))

        def fill(task: tuple[int, int]) -> None:
            expert, first = task
            source = self.parts[first][expert].numpy()
            separate(source, *matrices.at(expert), first, len(self.parts), reorder=self.halves)

        parallel_map(fill, [(expert, first) for expert in range(experts) for first in range(len(self.parts))])
        return matrices


class _MappedLinear(torch.autograd.Function):
    """x times the matrix of an expert, which the backward pass reads from the file again instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, matrices: GgmlMxfp4, index: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.matrices, ctx.index = matrices, index
        return mxfp4.linear(x, matrices.at(index))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return mxfp4.input_gradient(grad, *ctx.matrices.at(ctx.index)), None, None


def linear(x: Float[Tensor, "rows columns"], matrices: GgmlMxfp4, index: int) -> Float[Tensor, "rows out"]:
    """Return x times the matrix of one expert."""
    return _MappedLinear.apply(x, matrices, index)


def new_memory(shape: tuple[int, ...]) -> Tensor:
    """Return bytes of the given shape [...] that are not initialised, in huge pages where the system has them.

    Measured on Linux: to get 1 GB of new memory takes 0.34 s of a processor in pages of 4 KiB and 0.14 s in huge ones.
    """
    size = math.prod(shape)
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def separate(source: Bytes, blocks: Tensor, scales: Tensor, first: int, stride: int, *, reorder: bool) -> None:
    """Write rows of ggml's blocks [row, group, 17] as bytes [row, group, 16] in the published order, and scales.

    Row i of the source is row first + stride · i of the results. reorder: False if the bytes have the published order.
    """
    rows, groups = source.shape[:2]
    if cpu.unavailable():
        target, codes = blocks[first::stride].numpy(), source[..., 1:]
        if reorder:
            from_ggml(codes, target)
        else:
            target[...] = codes
        scales[first::stride].numpy()[...] = source[..., 0]
        return
    from workbench.kernels.cpu.ggml_loops import separate_rows

    assert source.flags.c_contiguous
    assert all(tensor.is_contiguous() for tensor in (blocks, scales))
    separate_rows()(
        source.ctypes.data, rows, groups, blocks[first].data_ptr(), scales[first].data_ptr(), stride, reorder
    )


def widen_q8_0(source: Bytes, values: Tensor) -> None:
    """Write rows of Q8_0 [row, bytes] as bfloat16 [row, columns], rounded to the nearest, by the compiled loop."""
    from workbench.kernels.cpu.ggml_loops import widen_blocks

    assert source.flags.c_contiguous
    assert values.is_contiguous()
    assert (values.dtype, source.size * 32) == (torch.bfloat16, values.numel() * 34)
    widen_blocks()(source.ctypes.data, values.numel() // 32, values.data_ptr())


def from_ggml(blocks: Bytes, out: Bytes) -> None:
    """Reorder the nibbles of groups [row, group, 16] from ggml's order into `out` [row, group, 16]."""
    step = max(1, _ROWS // blocks.shape[1])
    for start in range(0, len(blocks), step):
        pairs = np.ascontiguousarray(blocks[start : start + step]).view("<u2")  # byte 2i, and byte 2i + 1 above it
        rows = out[start : start + step]
        rows[..., :8] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)  # values 0 to 15
        rows[..., 8:] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)  # values 16 to 31


def to_ggml(blocks: Bytes) -> Bytes:
    """Return groups [..., 16] in ggml's order."""
    low, high = blocks[..., :8], blocks[..., 8:]
    even = (low & 0x0F) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    return np.stack([even, odd], -1).reshape(blocks.shape)
