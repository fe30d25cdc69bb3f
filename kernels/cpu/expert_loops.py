"""The experts on one new token of each of a few rows: norm, router, choice, gates, both matrices, sum of the slots.

Reference: `workbench.model.layers.MoE` and `workbench.kernels.moe`.
"""

import math

import numpy as np

from workbench.kernels.cpu.layer_records import Phase
from workbench.kernels.cpu.loops import dense_chunk, expert_chunk
from workbench.kernels.cpu.piece_loops import ceil_divide, inline, normalize_row
from workbench.kernels.cpu.row_loops import (
    add,
    add_bias,
    add_weighted,
    bfloat16_at,
    float_at,
    multiply,
    round_row,
    separate_group,
    set_float,
    set_integer,
    swiglu_group,
)
from workbench.kernels.cpu.vectors import LANES, integer

GATE_UP_CHUNK, DOWN_CHUNK, COMBINE_CHUNK, ROUTER_CHUNK = 128, 64, 512, 8  # outputs of a piece
_PACKED = 16  # bytes of a group of MXFP4


@inline
def _expert_norm(row, w, s):
    """The norm before the router and the experts, in both orders in which they read it."""
    at = 4 * row * w.d_model
    normalize_row(s.middle + at, w.ln2, w.d_model, w.eps, s.scale + 4 * row, s.expert_input + at)
    for group in range(w.d_model // 32):
        separate_group(s.expert_input + at + 128 * group, s.expert_groups + at + 128 * group)


@inline
def _route(piece, w, s):
    """Scores of some experts in all rows; not rounded."""
    start = piece * ROUTER_CHUNK
    stop = start + ROUTER_CHUNK if w.num_experts % ROUTER_CHUNK == 0 else w.num_experts
    dense_chunk(start, stop, w.router, w.num_experts, w.d_model // 32, s.expert_input, s.rows, s.logits)
    for row in range(s.rows):
        for expert in range(start, stop):
            at = s.logits + 4 * (row * w.num_experts + expert)
            set_float(at, float_at(at) + bfloat16_at(w.router_bias + 2 * expert))


@inline
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


@inline
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


@inline
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


@inline
def _slots_of(hit, s):
    """Return an expert that has slots, and the first and last position of its slots in `order`."""
    first = integer(s.ends + 8 * hit - 8) if hit else 0
    return integer(s.hit + 8 * hit), first, integer(s.ends + 8 * hit)


@inline
def _add_expert_bias(piece, chunk, outputs, bias, results, s):
    """Add its expert's bias to the chunk of outputs of every slot, rounded."""
    chunks = ceil_divide(outputs, chunk)
    expert, first, end = _slots_of(piece // chunks, s)
    start = piece % chunks * chunk
    vectors = (min(start + chunk, outputs) - start) // LANES
    for position in range(first, end):
        at = results + 4 * (integer(s.order + 8 * position) * outputs + start)
        add_bias((at, bias + 2 * (expert * outputs + start)), np.float32(0), vectors, at)


@inline
def _gate_up(piece, w, s):
    """A chunk of an expert's gate and up, of all its slots."""
    outputs = 2 * w.d_mlp
    expert_chunk(
        piece, GATE_UP_CHUNK, w.gate_up_blocks, w.gate_up_scales, w.scales, _PACKED, 1, 0, outputs, w.d_model // 32,
        s.expert_groups, s.pairs, s.order, w.k, s.hit, s.ends,
    )  # fmt: skip
    _add_expert_bias(piece, GATE_UP_CHUNK, outputs, w.gate_up_bias, s.pairs, s)


@inline
def _activate(piece, w, s):
    """Some activations of a slot."""
    chunks = ceil_divide(w.d_mlp, COMBINE_CHUNK)
    slot, start = piece // chunks, piece % chunks * COMBINE_CHUNK
    for position in range(start, min(start + COMBINE_CHUNK, w.d_mlp), 32):
        at = slot * w.d_mlp + position
        swiglu_group(s.pairs + 8 * at, w.limit, w.alpha, s.post + 4 * at)


@inline
def _down(piece, w, s):
    """A chunk of an expert's outputs, of all its slots."""
    expert_chunk(
        piece, DOWN_CHUNK, w.down_blocks, w.down_scales, w.scales, _PACKED, 1, 0, w.d_model, w.d_mlp // 32, s.post,
        s.slot_out, s.order, 1, s.hit, s.ends,
    )  # fmt: skip
    _add_expert_bias(piece, DOWN_CHUNK, w.d_model, w.down_bias, s.slot_out, s)


@inline
def _combine(piece, w, s):
    """A chunk of a row's sum over its slots, and the residual stream after it."""
    chunks = ceil_divide(w.d_model, COMBINE_CHUNK)
    row, start = piece // chunks, piece % chunks * COMBINE_CHUNK
    vectors = (min(start + COMBINE_CHUNK, w.d_model) - start) // LANES
    at = 4 * (row * w.d_model + start)
    total = s.mlp_out + at
    for slot in range(row * w.k, (row + 1) * w.k):
        source, gate = s.slot_out + 4 * (slot * w.d_model + start), float_at(s.gates + 4 * slot)
        if slot == row * w.k:
            multiply((source,), gate, vectors, total)
        else:
            add_weighted((total, source), gate, vectors, total)
    round_row((total,), np.float32(0), vectors, total)
    add((s.middle + at, total), np.float32(0), vectors, s.result + at)


@inline
def compute_experts(phase, piece, w, s):
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
