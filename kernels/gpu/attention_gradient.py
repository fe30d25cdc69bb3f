"""The gradient of causal attention on the GPU: the pattern is recomputed from the log-sum-exp, in linear memory.

One kernel computes the gradient of the queries, a tile of queries at a time, and one those of keys and values, a tile
of keys at a time; every sum has a fixed order.

Reference: `workbench.kernels.attention`; FlashAttention-2 (arXiv 2307.08691).
Cost for T queries on S visible keys: 10 · T · S · n_heads · d_head flops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.attention_blocks import AttentionShape, key_range, load_rows, sequence_of, visible
from workbench.kernels.gpu.common import LOG2E, dot, narrow


@triton.jit
def _queries_gradient(
    q, k, v, dz, lse, delta, dq, starts, query_pos, queries, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all keys they see."""
    tile, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, start, n, prefix = sequence_of(tl.program_id(2), starts, query_pos, queries, PACKED)
    if tile * BLOCK_M >= n:
        return
    d = tl.arange(0, WIDTH)
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < n
    at = (batch * queries + start + index).to(tl.int64) * HEADS + h
    rows = load_rows(q + h * q_head, batch, start, q_batch, q_token, index, n, d, D, True)
    grad = tl.load(dz + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    log_total = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
    less = tl.load(delta + at, mask=inside, other=0.0)
    k, v = k + h // RATIO * k_head, v + h // RATIO * v_head
    first = prefix + tile * BLOCK_M
    low, _, _, high = key_range(first, tl.minimum(first + BLOCK_M, prefix + n) - 1, WINDOW, BLOCK_N)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for n0 in range(low, high, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        kt = load_rows(k, batch, start, k_batch, k_token, key, high, d, D, True)
        vt = load_rows(v, batch, start, v_batch, v_token, key, high, d, D, True)
        score = dot(rows, kt.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        seen = visible((prefix + index)[:, None], key[None, :], WINDOW)
        weight = tl.where(seen, tl.math.exp2(score - log_total[:, None]), 0.0)
        dweight = dot(grad, vt.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        acc = dot(narrow(weight * (dweight - less[:, None]), k.dtype.element_ty), kt, acc)
    acc *= scale / LOG2E
    tl.store(
        dq + at[:, None] * D + d[None, :], narrow(acc, dq.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
    )


@triton.jit
def _keys_gradient(
    q, k, v, dz, lse, delta, dk, dv, starts, query_pos, queries, keys, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys under all queries of all its heads in turn: no two programs write the same gradient."""
    tile, kv = tl.program_id(0), tl.program_id(1)
    batch, start, n, prefix = sequence_of(tl.program_id(2), starts, query_pos, queries, PACKED)
    if tile * BLOCK_N >= prefix + n:
        return
    d = tl.arange(0, WIDTH)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bound = prefix + n
    kt = load_rows(k + kv * k_head, batch, start, k_batch, k_token, key, bound, d, D, True)
    vt = load_rows(v + kv * v_head, batch, start, v_batch, v_token, key, bound, d, D, True)
    key_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    value_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    low = tl.maximum(0, tile * BLOCK_N - prefix) // BLOCK_M * BLOCK_M
    high = n
    if WINDOW:
        high = tl.minimum(n, tile * BLOCK_N + BLOCK_N - 1 + WINDOW - prefix)
    for head in range(RATIO):
        h = kv * RATIO + head
        for m0 in range(low, high, BLOCK_M):
            index = m0 + tl.arange(0, BLOCK_M)
            inside = index < n
            at = (batch * queries + start + index).to(tl.int64) * HEADS + h
            rows = load_rows(q + h * q_head, batch, start, q_batch, q_token, index, n, d, D, True)
            grad = tl.load(dz + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            log_total = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
            less = tl.load(delta + at, mask=inside, other=0.0)
            # Transposed, so that what is computed here is the left operand and can stay in registers.
            score = dot(kt, rows.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * scale
            seen = visible((prefix + index)[None, :], key[:, None], WINDOW) & inside[None, :]
            weight = tl.where(seen, tl.math.exp2(score - log_total[None, :]), 0.0)
            value_grad = dot(narrow(weight, v.dtype.element_ty), grad, value_grad)
            dweight = dot(vt, grad.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            key_grad = dot(narrow(weight * (dweight - less[None, :]), q.dtype.element_ty), rows, key_grad)
    to = ((batch * keys + start + key).to(tl.int64)) * (HEADS // RATIO) + kv
    mask = (key < bound)[:, None] & (d < D)[None, :]
    tl.store(dk + to[:, None] * D + d[None, :], narrow(key_grad * (scale / LOG2E), dk.dtype.element_ty), mask=mask)
    tl.store(dv + to[:, None] * D + d[None, :], narrow(value_grad, dv.dtype.element_ty), mask=mask)


def input_gradients(shape: AttentionShape, dz: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    dz: gradient of the output [batch query head d_head], contiguous. lse: log-sum-exp of the scores [batch query head].
    delta: sum over d_head of output times dz, less the gradient of lse, with the sink's share [batch query head].
    """
    q, k, v = shape.q, shape.k, shape.v
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    common = (shape.starts, shape.query_pos, q.shape[1])
    constants = {"HEADS": shape.heads, **shape.sizes, "PACKED": shape.packed}
    rows = tiles.queries_gradient_tile(q.dtype, tiles.target(q))
    columns = tiles.keys_gradient_tile(q.dtype, tiles.target(q))
    grid = (triton.cdiv(shape.longest, rows.blocks["BLOCK_M"]), shape.heads, shape.sequences)
    if all(grid):
        _queries_gradient[grid](
            q, k, v, dz, lse, delta, dq, *common, shape.scale, *shape.strides,
            **constants, **rows.blocks, **rows.options,
        )  # fmt: skip
        longest = shape.longest if shape.packed else k.shape[1]
        grid = (triton.cdiv(longest, columns.blocks["BLOCK_N"]), shape.kv, shape.sequences)
        _keys_gradient[grid](
            q, k, v, dz, lse, delta, dk, dv, *common, k.shape[1], shape.scale, *shape.strides,
            **constants, **columns.blocks, **columns.options,
        )  # fmt: skip
    return dq, dk, dv
