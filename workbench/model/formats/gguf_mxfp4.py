"""Between the two orders in which MXFP4 is stored, exactly: published, and ggml's.

Published: byte i of a group of 32 values holds value 2i in its low and 2i + 1 in its high nibble; scales are a tensor
of their own. ggml: a block of 17 bytes, the scale first; byte j holds value j in its low and j + 16 in its high nibble.

Cost: 17 bytes read and written for each group. Measured, one thread (Zen 4), where the result has its memory already:
15 GB/s by the compiled loop of `gguf_loops`, 0.3 GB/s by numpy. New memory costs more than that: see `new_memory`.
"""

import math
import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workbench.kernels import cpu

Bytes = npt.NDArray[np.uint8]
_ROWS = 2048  # groups at a time: their copies stay in cache
BLOCK_BYTES = 17


_HUGE = 1 << 24  # bytes from which memory is asked for in huge pages


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
    from workbench.model.formats.gguf_loops import separate_rows

    assert source.flags.c_contiguous
    assert all(tensor.is_contiguous() for tensor in (blocks, scales))
    separate_rows()(
        source.ctypes.data, rows, groups, blocks[first].data_ptr(), scales[first].data_ptr(), stride, reorder
    )


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
