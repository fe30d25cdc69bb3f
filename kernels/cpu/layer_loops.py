"""One new token of each of a few rows through a layer: phases that threads compute together, compiled as one loop.

A layer has thirteen phases. In each, threads take pieces of work from a counter until none is left, and go on when all
pieces are finished by any thread; so any number of threads may take part, and none waits for one that has not begun. A
launch computes neighbouring phases: all of them where no hook needs a value in between.

`LAYER` states where the weights of a layer are and how large it is; `STEP` where the values of a step are. All are
addresses and sizes in elements, except the bytes between keys. Values are float32, rounded where the reference rounds
to bfloat16. numba compiles the loop, as `workbench.kernels.cpu` explains.

Reference: `workbench.model.layers.Block`, whose numbers these are; Milakov and Gimelshein 2018, arXiv 1805.02867, for
the softmax in one pass over blocks of keys.
"""

import hashlib
import math
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numba import from_dtype, njit, types

from workbench.kernels.cpu import loops, row_loops
from workbench.kernels.cpu.loops import LANES, dense_chunk, expert_chunk, integer, take
from workbench.kernels.cpu.row_loops import (
    TILE,
    add,
    add_bias,
    add_weighted,
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
    normalize,
    round_row,
    rounded,
    separate_group,
    set_bfloat16,
    set_float,
    set_integer,
    sum_of_squares,
    swiglu_group,
    wait_for,
    weighted_sums_by_four,
    weighted_sums_by_one,
)


class Phase(IntEnum):
    """The phases of a layer in their order; `END` follows the last."""

    ATTENTION_NORM = 0
    PROJECT = 1
    ATTEND = 2
    OUTPUT = 3
    EXPERT_NORM = 4
    ROUTE = 5
    CHOOSE = 6
    GATE = 7
    GROUP = 8
    GATE_UP = 9
    ACTIVATE = 10
    DOWN = 11
    COMBINE = 12
    END = 13


_SIZES = ("d_model", "n_heads", "n_key_value_heads", "d_head", "window", "num_experts", "k", "d_mlp")
WEIGHTS = (
    "ln1", "q", "q_bias", "k_weight", "k_bias", "v", "v_bias", "sinks", "o", "o_bias", "ln2", "router", "router_bias",
    "gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias",
)  # fmt: skip
_NUMBERS = ("eps", "limit", "alpha")
LAYER = np.dtype(
    [(name, np.int64) for name in (*_SIZES, *WEIGHTS, "scales")] + [(name, np.float32) for name in _NUMBERS]
)
# The values of a step, in the order of `values` in `layer`; and what it is given besides.
VALUES = (
    "scale", "normalized", "queries", "new_keys", "new_values", "scores", "weighted", "lse", "sink", "z",
    "attention_out", "middle", "expert_input", "expert_groups", "logits", "choice", "gates", "order", "hit", "ends",
    "hits", "pairs", "post", "slot_out", "mlp_out", "result",
)  # fmt: skip
GIVEN = (
    "rows", "x", "keys", "values", "row_bytes", "key_bytes", "columns", "cos", "sin", "rotates", "halves", "adds",
)  # fmt: skip
STEP = np.dtype([(name, np.int64) for name in (*VALUES, *GIVEN)])

COUNTER_BYTES = 128  # of a phase: two counters, in lines of memory of their own
BLOCK = 128  # keys whose scores of all heads are held at a time
_DENSE_CHUNK, _GATE_UP_CHUNK, _DOWN_CHUNK, _COMBINE_CHUNK = 32, 128, 64, 512
_ROUTER_CHUNK = 8
_PACKED = 16  # bytes of a group of MXFP4
_ABSENT = np.float32(-3e38)  # the score of a key that pads a vector

_inline = njit(nogil=True)


@_inline
def _ceil(a, b):
    return (a + b - 1) // b


@_inline
def _pieces(phase, w, s):
    """Return the number of pieces of a phase."""
    pieces = s.rows
    if phase == Phase.PROJECT:
        heads = _ceil(w.n_heads * w.d_head, _DENSE_CHUNK)
        pieces = heads + 2 * _ceil(w.n_key_value_heads * w.d_head, _DENSE_CHUNK)
    elif phase == Phase.ATTEND:
        pieces = s.rows * w.n_key_value_heads
    elif phase == Phase.OUTPUT:
        pieces = _ceil(w.d_model, _DENSE_CHUNK)
    elif phase == Phase.ROUTE:
        pieces = w.num_experts // _ROUTER_CHUNK if w.num_experts % _ROUTER_CHUNK == 0 else 1
    elif phase == Phase.GROUP:
        pieces = 1
    elif phase == Phase.GATE_UP:
        pieces = integer(s.hits) * _ceil(2 * w.d_mlp, _GATE_UP_CHUNK)
    elif phase == Phase.ACTIVATE:
        pieces = s.rows * w.k * _ceil(w.d_mlp, _COMBINE_CHUNK)
    elif phase == Phase.DOWN:
        pieces = integer(s.hits) * _ceil(w.d_model, _DOWN_CHUNK)
    elif phase == Phase.COMBINE:
        pieces = s.rows * _ceil(w.d_model, _COMBINE_CHUNK)
    return pieces


@_inline
def _norm(x, weight, width, eps, scale, result):
    """RMSNorm of a row, and its scale."""
    square = sum_of_squares(x, width // LANES) / np.float32(width)
    root = np.float32(math.sqrt(square + eps))
    set_float(scale, root)
    if result:
        normalize((x, weight), root, width // LANES, result)


@_inline
def _dense(piece, matrix, bias, outputs, width, inputs, rows, results):
    """`_DENSE_CHUNK` outputs of a product with a bias, rounded."""
    start = piece * _DENSE_CHUNK
    stop = min(start + _DENSE_CHUNK, outputs)
    dense_chunk(start, stop, matrix, outputs, width // 32, inputs, rows, results)
    for row in range(rows):
        at = results + 4 * (row * outputs + start)
        add_bias((at, bias + 2 * start), np.float32(0), (stop - start) // LANES, at)


@_inline
def _project(piece, w, s):
    """Queries, keys or values of all rows."""
    q_out, k_out = w.n_heads * w.d_head, w.n_key_value_heads * w.d_head
    q_pieces, k_pieces = _ceil(q_out, _DENSE_CHUNK), _ceil(k_out, _DENSE_CHUNK)
    if piece < q_pieces:
        _dense(piece, w.q, w.q_bias, q_out, w.d_model, s.normalized, s.rows, s.queries)
    elif piece < q_pieces + k_pieces:
        _dense(piece - q_pieces, w.k_weight, w.k_bias, k_out, w.d_model, s.normalized, s.rows, s.new_keys)
    else:
        _dense(piece - q_pieces - k_pieces, w.v, w.v_bias, k_out, w.d_model, s.normalized, s.rows, s.new_values)


@_inline
def _rotate(x, cos, sin, half):
    """Rotate a head in place, rounded."""
    for i in range(half):
        a, b = float_at(x + 4 * i), float_at(x + 4 * (i + half))
        c, d = float_at(cos + 4 * i), float_at(sin + 4 * i)
        set_float(x + 4 * i, rounded(a * c - b * d))
        set_float(x + 4 * (i + half), rounded(b * c + a * d))


@_inline
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


@_inline
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


@_inline
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


@_inline
def _soften(scores, n, top_at, total_at, sums, vectors):
    """Replace n scores by their weights against the largest so far, to which earlier sums are scaled."""
    padded = _ceil(n, LANES)
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


@_inline
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


@_inline
def _output(piece, w, s):
    """The output projection of all rows, and the residual stream after it."""
    _dense(piece, w.o, w.o_bias, w.d_model, w.n_heads * w.d_head, s.z, s.rows, s.attention_out)
    start = piece * _DENSE_CHUNK
    vectors = min(_DENSE_CHUNK, w.d_model - start) // LANES
    for row in range(s.rows):
        at = 4 * (row * w.d_model + start)
        add((s.x + at, s.attention_out + at), np.float32(0), vectors, s.middle + at)


@_inline
def _expert_norm(row, w, s):
    """The norm before the router and the experts, in both orders in which they read it."""
    at = 4 * row * w.d_model
    _norm(s.middle + at, w.ln2, w.d_model, w.eps, s.scale + 4 * row, s.expert_input + at)
    for group in range(w.d_model // 32):
        separate_group(s.expert_input + at + 128 * group, s.expert_groups + at + 128 * group)


@_inline
def _route(piece, w, s):
    """Scores of some experts in all rows; not rounded."""
    start = piece * _ROUTER_CHUNK
    stop = start + _ROUTER_CHUNK if w.num_experts % _ROUTER_CHUNK == 0 else w.num_experts
    dense_chunk(start, stop, w.router, w.num_experts, w.d_model // 32, s.expert_input, s.rows, s.logits)
    for row in range(s.rows):
        for expert in range(start, stop):
            at = s.logits + 4 * (row * w.num_experts + expert)
            set_float(at, float_at(at) + bfloat16_at(w.router_bias + 2 * expert))


@_inline
def _choose(row, w, s):
    """The k largest scores of a row, descending; the smaller id first where they are equal, and NaN before numbers."""
    logits, choice = s.logits + 4 * row * w.num_experts, s.choice + 8 * row * w.k
    for slot in range(w.k):
        best, top = -1, np.float32(0)
        for expert in range(w.num_experts):
            score = float_at(logits + 4 * expert)
            if best >= 0 and not (score > top or (math.isnan(score) and not math.isnan(top))):
                continue
            taken = False
            for earlier in range(slot):
                taken = taken or integer(choice + 8 * earlier) == expert
            if not taken:
                best, top = expert, score
        set_integer(choice + 8 * slot, best)


@_inline
def _gate(row, w, s):
    """The softmax over the scores of the chosen experts."""
    logits, choice, gates = s.logits + 4 * row * w.num_experts, s.choice + 8 * row * w.k, s.gates + 4 * row * w.k
    top, total = np.float32(-np.inf), np.float32(0)
    for slot in range(w.k):
        top = max(top, float_at(logits + 4 * integer(choice + 8 * slot)))
    for slot in range(w.k):
        power = np.float32(math.exp(float_at(logits + 4 * integer(choice + 8 * slot)) - top))
        set_float(gates + 4 * slot, power)
        total += power
    for slot in range(w.k):
        set_float(gates + 4 * slot, float_at(gates + 4 * slot) / total)


@_inline
def _group(w, s):
    """Sort the slots of all rows by their experts."""
    slots = s.rows * w.k
    hits = 0
    placed = 0
    for expert in range(w.num_experts):
        before = placed
        for slot in range(slots):
            if integer(s.choice + 8 * slot) == expert:
                set_integer(s.order + 8 * placed, slot)
                placed += 1
        if placed > before:
            set_integer(s.hit + 8 * hits, expert)
            set_integer(s.ends + 8 * hits, placed)
            hits += 1
    set_integer(s.hits, hits)


@_inline
def _slots_of(hit, s):
    """Return an expert that has slots, and the first and last position of its slots in `order`."""
    first = integer(s.ends + 8 * hit - 8) if hit else 0
    return integer(s.hit + 8 * hit), first, integer(s.ends + 8 * hit)


@_inline
def _add_expert_bias(piece, chunk, outputs, bias, results, s):
    """Add its expert's bias to the chunk of outputs of every slot, rounded."""
    chunks = _ceil(outputs, chunk)
    expert, first, end = _slots_of(piece // chunks, s)
    start = piece % chunks * chunk
    vectors = (min(start + chunk, outputs) - start) // LANES
    for position in range(first, end):
        at = results + 4 * (integer(s.order + 8 * position) * outputs + start)
        add_bias((at, bias + 2 * (expert * outputs + start)), np.float32(0), vectors, at)


@_inline
def _gate_up(piece, w, s):
    """A chunk of an expert's gate and up, of all its slots."""
    outputs = 2 * w.d_mlp
    expert_chunk(
        piece, _GATE_UP_CHUNK, w.gate_up_blocks, w.gate_up_scales, w.scales, _PACKED, 1, 0, outputs, w.d_model // 32,
        s.expert_groups, s.pairs, s.order, w.k, s.hit, s.ends,
    )  # fmt: skip
    _add_expert_bias(piece, _GATE_UP_CHUNK, outputs, w.gate_up_bias, s.pairs, s)


@_inline
def _activate(piece, w, s):
    """Some activations of a slot."""
    chunks = _ceil(w.d_mlp, _COMBINE_CHUNK)
    slot, start = piece // chunks, piece % chunks * _COMBINE_CHUNK
    for position in range(start, min(start + _COMBINE_CHUNK, w.d_mlp), 32):
        at = slot * w.d_mlp + position
        swiglu_group(s.pairs + 8 * at, w.limit, w.alpha, s.post + 4 * at, s.halves)


@_inline
def _down(piece, w, s):
    """A chunk of an expert's outputs, of all its slots."""
    expert_chunk(
        piece, _DOWN_CHUNK, w.down_blocks, w.down_scales, w.scales, _PACKED, 1, 0, w.d_model, w.d_mlp // 32, s.post,
        s.slot_out, s.order, 1, s.hit, s.ends,
    )  # fmt: skip
    _add_expert_bias(piece, _DOWN_CHUNK, w.d_model, w.down_bias, s.slot_out, s)


@_inline
def _combine(piece, w, s):
    """A chunk of a row's sum over its slots, and the residual stream after it."""
    chunks = _ceil(w.d_model, _COMBINE_CHUNK)
    row, start = piece // chunks, piece % chunks * _COMBINE_CHUNK
    vectors = (min(start + _COMBINE_CHUNK, w.d_model) - start) // LANES
    at = 4 * (row * w.d_model + start)
    total = s.mlp_out + at
    for slot in range(row * w.k, (row + 1) * w.k):
        source, gate = s.slot_out + 4 * (slot * w.d_model + start), float_at(s.gates + 4 * slot)
        if slot == row * w.k:
            multiply((source,), gate, vectors, total)
        else:
            add_weighted((total, source), gate, vectors, total)
    round_row((total,), np.float32(0), vectors, total)
    if s.adds:
        add((s.middle + at, total), np.float32(0), vectors, s.result + at)


@_inline
def _compute_attention(phase, piece, w, s):
    """Compute one piece of a phase of attention."""
    if phase == Phase.ATTENTION_NORM:
        at = 4 * piece * w.d_model
        result = s.normalized + at if s.normalized else 0
        _norm(s.x + at, w.ln1, w.d_model, w.eps, s.scale + 4 * piece, result)
    elif phase == Phase.PROJECT:
        _project(piece, w, s)
    elif phase == Phase.ATTEND:
        _attend(piece, w, s)
    else:
        _output(piece, w, s)


@_inline
def _compute_experts(phase, piece, w, s):
    """Compute one piece of a phase of the experts."""
    if phase == Phase.EXPERT_NORM:
        _expert_norm(piece, w, s)
    elif phase == Phase.ROUTE:
        _route(piece, w, s)
    elif phase == Phase.CHOOSE:
        _choose(piece, w, s)
    elif phase == Phase.GATE:
        _gate(piece, w, s)
    elif phase == Phase.GROUP:
        _group(w, s)
    elif phase == Phase.GATE_UP:
        _gate_up(piece, w, s)
    elif phase == Phase.ACTIVATE:
        _activate(piece, w, s)
    elif phase == Phase.DOWN:
        _down(piece, w, s)
    else:
        _combine(piece, w, s)


def _run_phases(_, counters, layer, step, first, end):
    """Compute the phases from `first` to before `end`, together with every other thread that runs this."""
    w, s = layer[0], step[0]
    for phase in range(first, end):
        taken = counters + COUNTER_BYTES * (phase - first)
        finished = taken + COUNTER_BYTES // 2
        pieces = _pieces(phase, w, s)
        while True:
            piece = take(taken, 1)
            if piece >= pieces:
                break
            if phase < Phase.EXPERT_NORM:
                _compute_attention(phase, piece, w, s)
            else:
                _compute_experts(phase, piece, w, s)
            take(finished, 1)
        wait_for(finished, pieces)


def compile_phases() -> Callable[..., None]:
    """Return the compiled `_run_phases`: from the cache on disk if it has them."""
    # numba's cache compares the age of this file only, so the name contains a digest of the other files.
    files = (Path(str(module.__file__)) for module in (loops, row_loops))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    _run_phases.__qualname__ = f"_run_phases_{digest}"
    records: list[Any] = [types.Array(from_dtype(kind), 1, "C") for kind in (LAYER, STEP)]
    signature = types.void(types.int64, types.int64, *records, types.int64, types.int64)
    try:
        return njit(signature, nogil=True, cache=True)(_run_phases)
    except (RuntimeError, OSError):  # no folder for the cache can be written
        return njit(signature, nogil=True)(_run_phases)
