"""Causal attention on the GPU over sequences end to end or in rows, with a window, grouped heads, a prefix and sinks.

A row's running maximum starts at its sink and its sum at one, so that the log-sum-exp includes the sink and the sink's
probability costs one exp2 and one store. Blocks of keys outside the window are never read, and only blocks on its two
edges are masked. A few queries on many keys (decoding) share a tile between the heads of a key-value head and split
the keys over programs; a second kernel combines the partial results. Gradients are computed by
`workbench.kernels.gpu.attention_gradient`.

Reference: `workbench.kernels.attention`; FlashAttention-2 (arXiv 2307.08691); Flash-Decoding (crfm.stanford.edu, 2023).
Cost for T queries on S visible keys: 4 · T · S · n_heads · d_head flops.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.attention_blocks import AttentionShape, key_range, load_rows, sequence_of, visible
from workbench.kernels.gpu.attention_gradient import input_gradients
from workbench.kernels.gpu.common import LOG2E, dot, narrow, on_device_of_first


@triton.jit
def _step(
    acc, top, total, q, k, v, batch, start, k_batch, k_token, v_batch, v_token, n0, bound, position, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running maximum, sum and weighted values, in units of log2."""
    key = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH)
    kt = load_rows(k, batch, start, k_batch, k_token, key, bound, d, D, MASKED or WIDTH != D)
    score = dot(q, kt.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * scale
    if MASKED:
        seen = visible(position[:, None], key[None, :], WINDOW) & (key < bound)[None, :]
        score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(top, tl.max(score, 1))
    # A row that has met no key yet has no maximum: 0 stands in, and its weights are exp2(−inf) = 0.
    safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    weight = tl.math.exp2(score - safe[:, None])
    shrink = tl.math.exp2(top - safe)
    vt = load_rows(v, batch, start, v_batch, v_token, key, bound, d, D, MASKED or WIDTH != D)
    return dot(narrow(weight, v.dtype.element_ty), vt, acc * shrink[:, None]), new, total * shrink + tl.sum(weight, 1)


@triton.jit
def _forward(
    q, k, v, sinks, z, lse, sink, starts, query_pos, queries, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # long rows first: they take longest
    batch, start, n, prefix = sequence_of(tl.program_id(2), starts, query_pos, queries, PACKED)
    if tile * BLOCK_M >= n:
        return
    d = tl.arange(0, WIDTH)
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = load_rows(q + h * q_head, batch, start, q_batch, q_token, index, n, d, D, True)
    k, v = k + h // RATIO * k_head, v + h // RATIO * v_head
    position = prefix + index
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        logit = tl.load(sinks + h).to(tl.float32) * LOG2E
        top, total = tl.zeros([BLOCK_M], tl.float32) + logit, total + 1
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    first = prefix + tile * BLOCK_M
    low, inner, outer, high = key_range(first, tl.minimum(first + BLOCK_M, prefix + n) - 1, WINDOW, BLOCK_N)
    for n0 in range(low, inner, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, rows, k, v, batch, start, k_batch, k_token, v_batch, v_token, n0, high, position, scale,
            D, WIDTH, WINDOW, BLOCK_N, True,
        )  # fmt: skip
    for n0 in range(inner, outer, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, rows, k, v, batch, start, k_batch, k_token, v_batch, v_token, n0, high, position, scale,
            D, WIDTH, WINDOW, BLOCK_N, False,
        )  # fmt: skip
    for n0 in range(outer, high, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, rows, k, v, batch, start, k_batch, k_token, v_batch, v_token, n0, high, position, scale,
            D, WIDTH, WINDOW, BLOCK_N, True,
        )  # fmt: skip
    total = tl.where(index < n, total, 1.0)  # rows beyond the last query may have met no key
    log_total = top + tl.math.log2(total)
    at = ((batch * queries + start + index).to(tl.int64)) * HEADS + h
    inside = index < n
    out = narrow(acc / total[:, None], z.dtype.element_ty)
    tl.store(z + at[:, None] * D + d[None, :], out, mask=inside[:, None] & (d < D)[None, :])
    tl.store(lse + at, log_total / LOG2E, mask=inside)
    if SINKS:
        tl.store(sink + at, tl.math.exp2(logit - log_total), mask=inside)


@triton.jit
def _split(
    q, k, v, parts, tops, totals, query_pos, queries, chunk, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of all heads of one key-value head on one chunk of its keys; the sink is added by `_merge`."""
    split, kv = tl.program_id(0), tl.program_id(1)
    batch, start, n, prefix = sequence_of(tl.program_id(2), query_pos, query_pos, queries, False)
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, BLOCK_M)  # query · RATIO + head
    index, h = row // RATIO, kv * RATIO + row % RATIO
    at = batch * q_batch + (index * q_token + h * q_head).to(tl.int64)
    mask = (index < n)[:, None] & (d < D)[None, :]
    rows = tl.load(q + at[:, None] + d[None, :], mask=mask, other=0.0)
    k, v = k + kv * k_head, v + kv * v_head
    low, _, _, high = key_range(prefix, prefix + n - 1, WINDOW, BLOCK_N)
    low += split * chunk
    high = tl.minimum(high, low + chunk)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Transposed: 16 rows are too few for the left operand of a wide matrix instruction, the keys are not.
    acc = tl.zeros([WIDTH, BLOCK_M], tl.float32)
    for n0 in range(low, high, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        kt = load_rows(k, batch, start, k_batch, k_token, key, high, d, D, True)
        score = dot(kt, rows.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
        seen = visible((prefix + index)[None, :], key[:, None], WINDOW) & (key < high)[:, None]
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.math.exp2(score - safe[None, :])
        shrink = tl.math.exp2(top - safe)
        vt = load_rows(v, batch, start, v_batch, v_token, key, high, d, D, True)
        acc = dot(vt.T, narrow(weight, v.dtype.element_ty), acc * shrink[None, :])
        top, total = new, total * shrink + tl.sum(weight, 0)
    to = ((tl.program_id(2) * tl.num_programs(1) + kv) * tl.num_programs(0) + split).to(tl.int64) * BLOCK_M + row
    tl.store(parts + to[None, :] * WIDTH + d[:, None], acc)
    tl.store(tops + to, top)
    tl.store(totals + to, total)


@triton.jit
def _merge(
    parts, tops, totals, sinks, z, lse, sink, queries, splits,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query of one head from its parts."""
    i, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    part = tl.arange(0, SPLITS)
    at = ((s * (HEADS // RATIO) + h // RATIO) * splits + part) * BLOCK_M + i * RATIO + h % RATIO
    top = tl.load(tops + at, mask=part < splits, other=float("-inf"))
    total = tl.load(totals + at, mask=part < splits, other=0.0)
    rows = tl.load(parts + at[:, None] * WIDTH + d[None, :], mask=(part < splits)[:, None], other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        logit = tl.load(sinks + h).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, logit)
    weight = tl.math.exp2(top - highest)
    denominator = tl.sum(weight * total, 0)
    if SINKS:
        denominator += tl.math.exp2(logit - highest)
    to = (s * queries + i) * HEADS + h
    out = tl.sum(rows * weight[:, None], 0) / denominator
    tl.store(z + to * D + d, narrow(out, z.dtype.element_ty), mask=d < D)
    log_total = highest + tl.math.log2(denominator)
    tl.store(lse + to, log_total / LOG2E)
    if SINKS:
        tl.store(sink + to, tl.math.exp2(logit - log_total))


def _run(shape: AttentionShape, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q = shape.q
    z = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, sink = torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)
    target = tiles.target(q)
    together = shape.longest * shape.heads // shape.kv  # rows of a tile that all heads of a kv head share
    if not shape.packed and together <= tiles.MOST_ROWS_TO_SPLIT:
        _decode(shape, sinks, z, lse, sink, together)
        return z, lse, sink
    tile = tiles.attention_tile(shape.sizes["WIDTH"], q.dtype, target)
    grid = (triton.cdiv(shape.longest, tile.blocks["BLOCK_M"]), shape.heads, shape.sequences)
    if all(grid):
        _forward[grid](
            q, shape.k, shape.v, q if sinks is None else sinks, z, lse, sink, shape.starts, shape.query_pos,
            q.shape[1], shape.scale, *shape.strides,
            HEADS=shape.heads, **shape.sizes, PACKED=shape.packed, SINKS=sinks is not None,
            **tile.blocks, **tile.options,
        )  # fmt: skip
    return z, lse, sink


def _decode(shape: AttentionShape, sinks: Tensor | None, z: Tensor, lse: Tensor, sink: Tensor, together: int) -> None:
    q, n = shape.q, shape.q.shape[1]
    tile = tiles.decode_tile(together, q.dtype, tiles.target(q))
    if together > tile.blocks["BLOCK_M"]:
        raise ValueError(f"{together} rows share a decode tile of {tile.blocks['BLOCK_M']}: choose a larger BLOCK_M")
    n_visible = shape.k.shape[1] if shape.window is None else min(shape.k.shape[1], shape.window + n)
    blocks = triton.cdiv(n_visible, tile.blocks["BLOCK_N"]) + 1  # the first key need not begin a block
    splits = min(blocks, tiles.splits(shape.sequences * shape.kv, q.device))
    chunk = triton.cdiv(blocks, splits) * tile.blocks["BLOCK_N"]
    rows = shape.sequences * shape.kv * splits * tile.blocks["BLOCK_M"]
    parts = torch.empty(rows, shape.sizes["WIDTH"], dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, rows, dtype=torch.float32, device=q.device)
    _split[splits, shape.kv, shape.sequences](
        q, shape.k, shape.v, parts, tops, totals, shape.query_pos, n, chunk, shape.scale, *shape.strides,
        **shape.sizes, **tile.blocks, **tile.options,
    )  # fmt: skip
    merge = {name: shape.sizes[name] for name in ("RATIO", "D", "WIDTH")}
    _merge[n, shape.heads, shape.sequences](
        parts, tops, totals, q if sinks is None else sinks, z, lse, sink, n, splits,
        HEADS=shape.heads, **merge, SINKS=sinks is not None, BLOCK_M=tile.blocks["BLOCK_M"],
        SPLITS=triton.next_power_of_2(splits), num_warps=1,
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    """Saves inputs, result and row statistics for the gradient, which recomputes the pattern block by block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, query_pos: Tensor, window: int | None,
        lengths: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        shape = AttentionShape.of(q, k, v, query_pos, window, lengths)
        z, lse, sink = _run(shape, sinks)
        ctx.save_for_backward(q, k, v, query_pos, z, lse, sink)
        ctx.window, ctx.lengths, ctx.sinks = window, lengths, None if sinks is None else sinks.dtype
        return z, lse, sink

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dlse: Tensor, dsink: Tensor) -> Any:
        q, k, v, query_pos, z, lse, sink = ctx.saved_tensors
        shape = AttentionShape.of(q, k, v, query_pos, ctx.window, ctx.lengths)
        # ds = p · (dp − delta) for a key; for the sink p · (dsink − delta), as its value is zero.
        delta = (dz.float() * z.float()).sum(-1) - dlse
        if ctx.sinks is not None:
            delta += sink * dsink
        dq, dk, dv = input_gradients(shape, dz.contiguous(), lse, delta)
        dsinks = None if ctx.sinks is None else (sink * (dsink - delta)).sum((0, 1)).to(ctx.sinks)
        return dq, dk, dv, dsinks, None, None, None


@on_device_of_first
def attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    v: Float[Tensor, "batch key kv d_head"],
    query_pos: Int[Tensor, "batch query"],
    window: int | None,
    *,
    lengths: Sequence[int] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch query head"], Tensor | None]:
    """Return attention in q's dtype, the log-sum-exp of the scores, and the sink's probability [batch query head].

    Without sinks all is over the keys alone, and the third is None. The positions of a row are consecutive; keys may
    be a strided part of a longer cache, and what lies beyond a row's last position is not used. With `lengths` the
    single row holds several sequences end to end, which do not see each other.
    """
    z, lse, sink = _Attention.apply(q, k, v, sinks, query_pos, window, lengths)
    return z, lse, None if sinks is None else sink
