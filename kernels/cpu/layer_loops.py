"""One new token of each of a few rows through a layer: phases that threads compute together, compiled as one loop.

A layer has thirteen phases. In each, threads take pieces of work from a counter until none is left, and go on when all
pieces are finished by any thread; so any number of threads may take part, and none waits for one that has not begun. A
launch computes neighbouring phases: all of them where no hook needs a value in between.

The phases are in `attention_loops` and `expert_loops`; what they are given is described in `layer_records`. Values are
float32, rounded where the reference rounds to bfloat16. numba compiles the loop, as `workbench.kernels.cpu` explains.

Reference: `workbench.model.layers.Block`, whose numbers these are.
"""

from collections.abc import Callable
from typing import Any

from numba import from_dtype, types

from workbench.kernels.cpu.attention_loops import compute_attention
from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.expert_loops import COMBINE_CHUNK, DOWN_CHUNK, GATE_UP_CHUNK, ROUTER_CHUNK, compute_experts
from workbench.kernels.cpu.layer_records import COUNTER_BYTES, LAYER, STEP, Phase
from workbench.kernels.cpu.piece_loops import DENSE_CHUNK, ceil_divide, inline
from workbench.kernels.cpu.row_loops import wait_for
from workbench.kernels.cpu.vectors import integer, take


@inline
def _pieces(phase, w, s):
    """Return the number of pieces of a phase."""
    pieces = s.rows
    if phase == Phase.PROJECT:
        heads = ceil_divide(w.n_heads * w.d_head, DENSE_CHUNK)
        pieces = heads + 2 * ceil_divide(w.n_key_value_heads * w.d_head, DENSE_CHUNK)
    elif phase == Phase.ATTEND:
        pieces = s.rows * w.n_key_value_heads
    elif phase == Phase.OUTPUT:
        pieces = ceil_divide(w.d_model, DENSE_CHUNK)
    elif phase == Phase.ROUTE:
        pieces = w.num_experts // ROUTER_CHUNK if w.num_experts % ROUTER_CHUNK == 0 else 1
    elif phase == Phase.GROUP:
        pieces = 1
    elif phase == Phase.GATE_UP:
        pieces = integer(s.hits) * ceil_divide(2 * w.d_mlp, GATE_UP_CHUNK)
    elif phase == Phase.ACTIVATE:
        pieces = s.rows * w.k * ceil_divide(w.d_mlp, COMBINE_CHUNK)
    elif phase == Phase.DOWN:
        pieces = integer(s.hits) * ceil_divide(w.d_model, DOWN_CHUNK)
    elif phase == Phase.COMBINE:
        pieces = s.rows * ceil_divide(w.d_model, COMBINE_CHUNK)
    return pieces


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
                compute_attention(phase, piece, w, s)
            else:
                compute_experts(phase, piece, w, s)
            take(finished, 1)
        wait_for(finished, pieces)


def compile_phases() -> Callable[..., None]:
    """Return the compiled `_run_phases`: from the cache on disk if it has them."""
    records: list[Any] = [types.Array(from_dtype(kind), 1, "C") for kind in (LAYER, STEP)]
    return compile_loop(_run_phases, types.int64, types.int64, *records, types.int64, types.int64)
