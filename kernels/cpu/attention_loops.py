"""Attention to one new token of each of a few rows: norm, projections, cache, softmax with sinks, output.

Reference: `workbench.model.attention.Attention`; Milakov and Gimelshein 2018, arXiv 1805.02867, for the softmax in one
pass over blocks of keys.
"""

import math

import numpy as np

from workbench.kernels.cpu.layer_records import BLOCK, Phase
from workbench.kernels.cpu.piece_loops import DENSE_CHUNK, ceil_divide, dense_piece, inline, normalize_row
from workbench.kernels.cpu.row_loops import (
    TILE,
    add,
    bfloat16_at,
    divide_rounded,
    dots_by_four,
    dots_by_one,
    exponentials,
    fill,
    float_at,
    largest,
    multiply,
    multiply_rounded,
    rounded,
    set_bfloat16,
    set_float,
    weighted_sums_by_four,
    weighted_sums_by_one,
)
from workbench.kernels.cpu.vectors import LANES, integer

_ABSENT = np.float32(-3e38)  # the score of a key that pads a vector


@inline
def _project(piece, w, s):
    """Queries, keys or values of all rows."""
    q_out, k_out = w.n_heads * w.d_head, w.n_key_value_heads * w.d_head
    q_pieces, k_pieces = ceil_divide(q_out, DENSE_CHUNK), ceil_divide(k_out, DENSE_CHUNK)
    if piece < q_pieces:
        dense_piece(piece, w.q, w.q_bias, q_out, w.d_model, s.normalized, s.rows, s.queries)
    elif piece < q_pieces + k_pieces:
        dense_piece(piece - q_pieces, w.k_weight, w.k_bias, k_out, w.d_model, s.normalized, s.rows, s.new_keys)
    else:
        dense_piece(piece - q_pieces - k_pieces, w.v, w.v_bias, k_out, w.d_model, s.normalized, s.rows, s.new_values)


@inline
def _rotate(x, cos, sin, half):
    """Rotate a head in place, rounded."""
    for i in range(half):
        a, b = float_at(x + 4 * i), float_at(x + 4 * (i + half))
        c, d = float_at(cos + 4 * i), float_at(sin + 4 * i)
        set_float(x + 4 * i, rounded(a * c - b * d))
        set_float(x + 4 * (i + half), rounded(b * c + a * d))


@inline
def _store_new(row, head, w, s, column):
    """Rotate the new key and queries of a key-value head, and write its key and value into the cache."""
    half, grouped = w.d_head // 2, w.n_heads // w.n_key_value_heads
    cos, sin = s.cos + 4 * row * half, s.sin + 4 * row * half
    new = 4 * (row * w.n_key_value_heads + head) * w.d_head
    at = row * s.row_bytes + column * s.key_bytes + 2 * head * w.d_head
    _rotate(s.new_keys + new, cos, sin, half)
    for i in range(w.d_head):
        set_bfloat16(s.keys + at + 2 * i, float_at(s.new_keys + new + 4 * i))
        set_bfloat16(s.values + at + 2 * i, float_at(s.new_values + new + 4 * i))
    for query in range(head * grouped, (head + 1) * grouped):
        _rotate(s.queries + 4 * (row * w.n_heads + query) * w.d_head, cos, sin, half)


@inline
def _attend(piece, w, s):
    """The queries of one key-value head of a row, over the keys in reach; then with the sink, in z."""
    row, head = piece // w.n_key_value_heads, piece % w.n_key_value_heads
    heads, width, vectors = w.n_heads // w.n_key_value_heads, w.d_head, w.d_head // LANES
    column = integer(s.columns + 8 * row)
    if s.rotates:
        _store_new(row, head, w, s, column)
    first_head = row * w.n_heads + head * heads
    queries, sums = s.queries + 4 * first_head * width, s.weighted + 4 * first_head * width
    tops, totals = s.lse + 4 * first_head, s.sink + 4 * first_head  # until the end; then what they are called
    scores = s.scores + 4 * piece * heads * BLOCK
    scale = np.float32(1.0 / math.sqrt(width))
    for i in range(heads):
        set_float(tops + 4 * i, np.float32(-np.inf))
        set_float(totals + 4 * i, np.float32(0))
        fill((queries,), np.float32(0), vectors, sums + 4 * i * width)
    first = 0 if w.window < 0 else max(0, column - w.window + 1)
    for start in range(first, column + 1, BLOCK):
        n = min(BLOCK, column + 1 - start)
        at = row * s.row_bytes + start * s.key_bytes + 2 * head * width
        _scores(queries, s.keys + at, s.key_bytes, n, heads, vectors, scale, scores)
        for i in range(heads):
            _soften(scores + 4 * i * BLOCK, n, tops + 4 * i, totals + 4 * i, sums + 4 * i * width, vectors)
        _sum_values(scores, s.values + at, s.key_bytes, n, heads, vectors, sums)
    for i in range(heads):
        top, total = float_at(tops + 4 * i), float_at(totals + 4 * i)
        lse = top + np.float32(math.log(total))
        sink = np.float32(1) / (
            np.float32(1) + np.float32(math.exp(lse - bfloat16_at(w.sinks + 2 * (head * heads + i))))
        )
        at = sums + 4 * i * width
        divide_rounded((at,), total, vectors, at)
        multiply_rounded((at,), np.float32(1) - sink, vectors, s.z + 4 * (first_head + i) * width)
        set_float(tops + 4 * i, lse)
        set_float(totals + 4 * i, sink)


@inline
def _scores(queries, keys, key_bytes, n, heads, vectors, scale, scores):
    """Scores of `heads` queries with n keys, one row of `BLOCK` a head."""
    width = vectors * LANES
    for head in range(0, heads, TILE if heads % TILE == 0 else 1):
        query, row = queries + 4 * head * width, scores + 4 * head * BLOCK
        for i in range(n):
            if heads % TILE == 0:
                dots_by_four(query, keys + i * key_bytes, vectors, row + 4 * i, 4 * BLOCK, scale)
            else:
                dots_by_one(query, keys + i * key_bytes, vectors, row + 4 * i, 4 * BLOCK, scale)


@inline
def _soften(scores, n, top_at, total_at, sums, vectors):
    """Replace n scores by their weights against the largest so far, to which earlier sums are scaled."""
    padded = ceil_divide(n, LANES)
    for i in range(n, padded * LANES):
        set_float(scores + 4 * i, _ABSENT)
    before = float_at(top_at)
    top = max(before, largest(scores, padded))
    total = exponentials(scores, padded, top)
    if top > before:
        factor = np.float32(math.exp(before - top))
        multiply((sums,), factor, vectors, sums)
        set_float(top_at, top)
        set_float(total_at, float_at(total_at) * factor + total)
    else:
        set_float(total_at, float_at(total_at) + total)


@inline
def _sum_values(scores, values, value_bytes, n, heads, vectors, sums):
    """Add the weighted values of n keys to the sums of `heads` heads."""
    width = vectors * LANES
    for head in range(0, heads, TILE if heads % TILE == 0 else 1):
        for vector in range(vectors):
            at = sums + 4 * (head * width + vector * LANES)
            weights, source = scores + 4 * head * BLOCK, values + 2 * vector * LANES
            if heads % TILE == 0:
                weighted_sums_by_four(weights, 4 * BLOCK, source, value_bytes, n, at, 4 * width)
            else:
                weighted_sums_by_one(weights, 4 * BLOCK, source, value_bytes, n, at, 4 * width)


@inline
def _output(piece, w, s):
    """The output projection of all rows, and the residual stream after it."""
    dense_piece(piece, w.o, w.o_bias, w.d_model, w.n_heads * w.d_head, s.z, s.rows, s.attention_out)
    start = piece * DENSE_CHUNK
    vectors = min(DENSE_CHUNK, w.d_model - start) // LANES
    for row in range(s.rows):
        at = 4 * (row * w.d_model + start)
        add((s.x + at, s.attention_out + at), np.float32(0), vectors, s.middle + at)


@inline
def compute_attention(phase, piece, w, s):
    """Compute one piece of a phase of attention."""
    if phase == Phase.ATTENTION_NORM:
        at = 4 * piece * w.d_model
        result = s.normalized + at if s.normalized else 0
        normalize_row(s.x + at, w.ln1, w.d_model, w.eps, s.scale + 4 * piece, result)
    elif phase == Phase.PROJECT:
        _project(piece, w, s)
    elif phase == Phase.ATTEND:
        _attend(piece, w, s)
    else:
        _output(piece, w, s)
