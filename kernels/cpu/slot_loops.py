"""Steps of the experts between and after their products, on rows of bfloat16: SwiGLU, and the sum over the slots.

They compute in float32 what `expert_loops` computes for a few rows, in the same order and with the same roundings, but
read and write bfloat16, of any number of rows.
"""

from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.row_loops import _store_bfloat16, _swiglu, _widened
from workbench.kernels.cpu.vectors import (
    LANES,
    Value,
    _broadcast,
    _f32,
    _floats,
    _i64,
    _int,
    _ints,
    _load,
    _repeat,
    _words,
    take,
)

ACTIVATIONS = 2048  # that a thread takes at a time


@intrinsic
def _activate_pairs(typingctx, pairs, limit, alpha, vectors, result):
    """Write the activations of pairs of gate and up, 16 a vector."""

    def generate(context, b, signature, arguments):
        pairs, limit, alpha, vectors, result = arguments
        limit, alpha = _broadcast(b, limit), _broadcast(b, alpha)
        with cgutils.for_range(b, vectors, intp=_i64) as loop:
            bits = _load(b, _ints, pairs, b.mul(loop.index, _int(4 * LANES)))
            gate = b.bitcast(b.shl(bits, _repeat(_ints, 16)), _floats)
            up = b.bitcast(b.and_(bits, _repeat(_ints, 0xFFFF0000)), _floats)
            _store_bfloat16(b, _swiglu(b, gate, up, limit, alpha), result, b.mul(loop.index, _int(2 * LANES)))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64, types.int64), generate


@intrinsic
def _add_slots(typingctx, slots, gates, count, width, result):
    """Write the sum of `count` neighbouring rows [width], each times its gate in float32."""

    def generate(context, b, signature, arguments):
        slots, gates, count, width, result = arguments
        with cgutils.for_range(b, b.sdiv(width, _int(LANES)), intp=_i64) as loop:
            at = b.mul(loop.index, _int(2 * LANES))

            def weighted(slot: Value, at: Value = at) -> Value:
                row = _widened(b, _load(b, _words, slots, at, b.mul(slot, b.mul(width, _int(2)))))
                return b.fmul(row, _broadcast(b, _load(b, _f32, gates, b.mul(slot, _int(4)))))

            total = cgutils.alloca_once_value(b, _repeat(_floats, 0.0))
            b.store(weighted(_int(0)), total)
            with cgutils.for_range(b, b.sub(count, _int(1)), intp=_i64) as later:
                b.store(b.fadd(b.load(total), weighted(b.add(later.index, _int(1)))), total)
            _store_bfloat16(b, b.load(total), result, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _activate(counter, pairs, number, limit, alpha, result):
    """Write `number` activations; it is a multiple of 16."""
    while True:
        start = take(counter, 1) * ACTIVATIONS
        if start >= number:
            return
        vectors = min(ACTIVATIONS, number - start) // LANES
        _activate_pairs(pairs + 4 * start, limit, alpha, vectors, result + 2 * start)


def _combine(counter, slots, gates, rows, count, width, result):
    """Write the sums [rows, width] over slots [rows, count, width], each times its gate [rows, count]."""
    while True:
        row = take(counter, 1)
        if row >= rows:
            return
        _add_slots(slots + 2 * row * count * width, gates + 4 * row * count, count, width, result + 2 * row * width)


class SlotLoops(NamedTuple):
    """The compiled loops of this module."""

    activate: Callable[..., None]
    combine: Callable[..., None]


def compile_all() -> SlotLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    address = types.int64
    return SlotLoops(
        compile_loop(_activate, address, address, address, types.float32, types.float32, address),
        compile_loop(_combine, *[address] * 7),
    )
