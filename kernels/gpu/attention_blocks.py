"""What the attention kernels and their gradients share: sequences, blocks of rows, visible keys, sizes of a call."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from workbench.kernels.gpu.common import LOG2E


@triton.jit
def sequence_of(s, starts, query_pos, queries, PACKED: tl.constexpr):
    """Row of the batch, first token within it, number of queries, and position of the first one."""
    s = s.to(tl.int64)
    if PACKED:
        start = tl.load(starts + s)
        return s * 0, start, (tl.load(starts + s + 1) - start).to(tl.int32), tl.program_id(0) * 0
    return s, s * 0, queries, tl.load(query_pos + s * queries).to(tl.int32)


@triton.jit
def load_rows(x, batch, start, stride_batch, stride_token, index, bound, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [start + index, d] of one head; zeros from `bound` on, and beyond D where d is wider."""
    at = batch * stride_batch + (start + index)[:, None] * stride_token + d[None, :]
    if MASKED:
        return tl.load(x + at, mask=(index < bound)[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(x + at)


@triton.jit
def visible(position, key, WINDOW: tl.constexpr):
    """Whether a query at a position sees a key."""
    if WINDOW:
        return (key <= position) & (key > position - WINDOW)
    return key <= position


@triton.jit
def key_range(first, last, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries at positions first … last read: from, unmasked from, unmasked to (multiples of BLOCK_N), to."""
    low, inner = 0, 0
    if WINDOW:
        low = tl.maximum(0, first - WINDOW + 1) // BLOCK_N * BLOCK_N
        inner = (tl.maximum(0, last - WINDOW + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return low, inner, tl.maximum(inner, (first + 1) // BLOCK_N * BLOCK_N), last + 1


@lru_cache(maxsize=8)
def sequence_starts(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " boundary"]:
    """Return the first token of each packed sequence and the end: copied once for all layers of a pass."""
    return torch.tensor([0, *accumulate(lengths)]).to(device, non_blocking=True)


class AttentionShape(NamedTuple):
    """Arguments that every launch of one call shares; sequences are rows of the batch, or packed in its only row."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_pos: Tensor
    starts: Tensor  # of the packed sequences, and the end
    sequences: int
    longest: int  # queries of one sequence
    packed: bool
    window: int | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, window: int | None, lengths: Sequence[int] | None
    ) -> "AttentionShape":
        """Return the arguments of a call: q [batch query head d_head], k and v [batch key kv d_head]."""
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        query_pos = query_pos.contiguous()
        if lengths is None:  # nothing reads the starts
            return cls(q, k, v, query_pos, query_pos, len(q), q.shape[1], False, window)
        starts = sequence_starts(tuple(lengths), q.device)
        return cls(q, k, v, query_pos, starts, len(lengths), max(lengths, default=0), True, window)

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return self.q.shape[2]

    @property
    def kv(self) -> int:
        """Return the number of key-value heads."""
        return self.k.shape[2]

    @property
    def scale(self) -> float:
        """Return the factor of a dot product, in units of log2."""
        return float(self.q.shape[-1] ** -0.5 * LOG2E.value)

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the strides of batch, token and head of q, k and v."""
        return tuple(s for t in (self.q, self.k, self.v) for s in t.stride()[:3])

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the constexprs that every kernel has."""
        d = self.q.shape[-1]
        width = max(16, triton.next_power_of_2(d))
        return {"RATIO": self.heads // self.kv, "D": d, "WIDTH": width, "WINDOW": self.window or 0}
