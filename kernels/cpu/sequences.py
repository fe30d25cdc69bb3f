"""Causal attention of sequences of bfloat16 where the processor multiplies it slowly: the launcher of `sequence_loops`.

Reference: `workbench.kernels.attention`. Scores, weights and sums are in float32; results are rounded once.
Cost: 4 · queries · seen keys · n_heads · d_head flops; keys and values in float32, at most 32 MB of them or one head's.
"""

import functools
import threading

import torch
from jaxtyping import BFloat16, Float, Float32, Int
from torch import Tensor

from workbench.kernels.cpu import sequence_loops, threads, tiles
from workbench.kernels.cpu.sequence_loops import ARRANGED, BLOCK, QUERIES
from workbench.kernels.cpu.vectors import GROUP

FEWEST = 16  # queries: with fewer, most lanes of a vector would be empty
_ARRANGED_NUMBERS = 2**23  # of keys and of values, in float32, at a time

_loops = functools.cache(sequence_loops.compile_all)
_own = threading.local()


def covers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether attention of these queries [batch query head d_head] can be computed."""
    same = q.dtype == k.dtype == v.dtype == torch.bfloat16 and k.stride(-1) == v.stride(-1) == 1
    return same and q.shape[1] >= FEWEST and q.shape[3] % GROUP == 0 and k.shape[1] > 0 and tiles.available()


def attention(
    q: BFloat16[Tensor, "batch query head d_head"],
    k: BFloat16[Tensor, "batch key kv d_head"],
    v: BFloat16[Tensor, "batch key kv d_head"],
    query_pos: Int[Tensor, "batch query"],
    window: int | None,
    sinks: Float[Tensor, " head"] | None,
) -> tuple[
    BFloat16[Tensor, "batch query head d_head"],
    Float32[Tensor, "batch query head"],
    Float32[Tensor, "batch query head"] | None,
]:
    """Return attention, the log-sum-exp of each row's scores, with the sink if there is one, and its probability.

    The positions of a row are consecutive; `covers` the tensors.
    """
    q, starts = q.contiguous(), query_pos[:, 0].contiguous()
    batch, queries, heads, width = q.shape
    length = min(k.shape[1], int(starts.max()) + queries)
    z, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    p = torch.empty_like(lse) if sinks is not None else None
    scores = None if sinks is None else sinks.detach().float().contiguous()
    blocks, group = -(-length // BLOCK), heads // k.shape[2]
    size = sequence_loops.thread_bytes(group, width)
    together = max(1, _ARRANGED_NUMBERS // (2 * batch * BLOCK * blocks * width))
    for first in range(0, k.shape[2], together):
        own = slice(first, first + together)
        keys, values = (_arranged(part[:, :length, own], by_key) for part, by_key in ((k, True), (v, False)))
        groups = min(together, k.shape[2] - first)
        threads.run(
            _loops().attend, batch * groups * -(-queries // QUERIES), _thread_memory(size).data_ptr(), size,
            q.data_ptr(), batch, queries, heads, first * group, groups, group, width, keys.data_ptr(),
            values.data_ptr(), BLOCK * blocks, starts.data_ptr(), BLOCK * blocks if window is None else window,
            width**-0.5, 0 if scores is None else scores.data_ptr(), z.data_ptr(), lse.data_ptr(),
            0 if p is None else p.data_ptr(),
        )  # fmt: skip
    return z, lse, p


def _arranged(source: BFloat16[Tensor, "batch key kv d_head"], by_key: bool) -> Float32[Tensor, " numbers"]:
    """Return keys or values as the loops read them."""
    rows, length, heads, width = source.shape
    blocks = -(-length // BLOCK)
    result = torch.empty(rows * heads * BLOCK * blocks * width)
    threads.run(
        _loops().arrange, rows * heads * -(-blocks // ARRANGED), source.data_ptr(), rows,
        *(2 * source.stride(n) for n in range(3)), heads, length, width, int(by_key), result.data_ptr(),
    )  # fmt: skip
    return result


def _thread_memory(size: int) -> Tensor:
    """Return memory of this many bytes for every thread, aligned to 64 bytes, after a counter of 0."""
    total = 64 + torch.get_num_threads() * size
    if getattr(_own, "memory", None) is None or len(_own.memory) < total + 64:
        _own.memory = torch.empty(total + 64, dtype=torch.uint8)
    memory: Tensor = _own.memory[-_own.memory.data_ptr() % 64 :]
    memory[:8] = 0
    return memory
