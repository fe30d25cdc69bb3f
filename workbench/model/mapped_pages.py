"""Map the pages of weights in a memory-mapped file by a few calls, before a pass of many tokens reads all of them.

Otherwise the first read of every 64 KB interrupts a thread, about 4 microseconds each: 200,000 times in a file of the
size of gpt-oss-20b. Linux maps all pages of a tensor in one call (from 5.14 on), and reads them from the disk in order
where they are not in memory. On other systems pages are mapped one after the other when they are read.

Measured, two cores (Emerald Rapids), 13 GB that are in memory: 0.5 s on one thread, after which the first prompt of 75
tokens takes 3.3 s in place of 5.2 to 5.7.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.parallel import parallel_map

FEWEST_TOKENS = 32  # of a pass; fewer may leave out most experts
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux
_SMALLEST = 2**20  # bytes of a tensor
_PART = 2**26  # bytes of a call, so that all threads take part


def map_pages(module: nn.Module) -> None:
    """Map the pages of the module's large tensors on the CPU, at the first call for a module."""
    if module.__dict__.get("_pages_mapped") or (advise := _advise()) is None or torch.compiler.is_compiling():
        return
    module.__dict__["_pages_mapped"] = True
    parallel_map(lambda part: advise(*part), [part for tensor in _large_tensors(module) for part in _parts(tensor)])


def _large_tensors(module: nn.Module) -> Iterator[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    for inside in module.modules():
        mapped = inside.__dict__.get("mapped")
        tensors += mapped.parts if isinstance(mapped, GgmlMxfp4) else []
    for tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        if plain and tensor.nbytes >= _SMALLEST:
            yield tensor


def _parts(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield addresses and sizes of parts of the pages that lie within the tensor [...]."""
    page = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    for start in range(first, end, _PART):
        yield start, min(_PART, end - start)


@functools.cache
def _advise() -> Callable[[int, int], None] | None:
    """Return a function that maps the pages of a range of memory, or None where the system has none."""
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def advise(address: int, size: int) -> None:
        madvise(address, size, _POPULATE_READ)  # an older Linux refuses it, and maps the pages when they are read

    return advise
