"""RMSNorm and rotation of any number of positions in bfloat16, each in one pass over memory.

They compute in float32 and round once, with the numbers of the torch code and of `attention_loops`, bit for bit; the
sum of squares is added up as there, in another order than torch's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.row_loops import _store_bfloat16, _sum, _widened, set_float
from workbench.kernels.cpu.vectors import (
    LANES,
    _broadcast,
    _floats,
    _function,
    _i64,
    _int,
    _load,
    _repeat,
    _words,
    take,
)

ROWS = 16  # that a thread takes at a time


@intrinsic
def _sum_of_squares(typingctx, row, vectors):
    """Return the sum of the squares of a bfloat16 row."""

    def generate(context, b, signature, arguments):
        multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
        total = cgutils.alloca_once_value(b, _repeat(_floats, 0.0))
        with cgutils.for_range(b, arguments[1], intp=_i64) as loop:
            x = _widened(b, _load(b, _words, arguments[0], b.mul(loop.index, _int(2 * LANES))))
            b.store(b.call(multiply_add, [x, x, b.load(total)]), total)
        return _sum(b, b.load(total))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def _normalize(typingctx, row, weight, scale, vectors, result):
    """Write a bfloat16 row divided by its scale, times the weight."""

    def generate(context, b, signature, arguments):
        row, weight, scale, vectors, result = arguments
        scale = _broadcast(b, scale)
        with cgutils.for_range(b, vectors, intp=_i64) as loop:
            at = b.mul(loop.index, _int(2 * LANES))
            x, factor = (_widened(b, _load(b, _words, source, at)) for source in (row, weight))
            _store_bfloat16(b, b.fmul(b.fdiv(x, scale), factor), result, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), generate


@intrinsic
def _rotate_head(typingctx, head, cos, sin, vectors, result):
    """Write a bfloat16 head whose halves, of `vectors` vectors each, are turned by the angles."""

    def generate(context, b, signature, arguments):
        head, cos, sin, vectors, result = arguments
        half = b.mul(vectors, _int(2 * LANES))
        with cgutils.for_range(b, vectors, intp=_i64) as loop:
            wide, narrow = b.mul(loop.index, _int(4 * LANES)), b.mul(loop.index, _int(2 * LANES))
            x, y = (_widened(b, _load(b, _words, head, narrow, offset)) for offset in (_int(0), half))
            c, s = _load(b, _floats, cos, wide), _load(b, _floats, sin, wide)
            _store_bfloat16(b, b.fsub(b.fmul(x, c), b.fmul(y, s)), result, narrow)
            _store_bfloat16(b, b.fadd(b.fmul(y, c), b.fmul(x, s)), result, narrow, half)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _norm(counter, x, weight, rows, width, eps, scales, results):
    """Write the scales of bfloat16 rows [rows, width] and, if there is a weight, the normalised rows."""
    while True:
        start = take(counter, 1) * ROWS
        if start >= rows:
            return
        for row in range(start, min(start + ROWS, rows)):
            at = 2 * row * width
            square = _sum_of_squares(x + at, width // LANES) / np.float32(width)
            root = np.float32(math.sqrt(square + eps))
            set_float(scales + 4 * row, root)
            if weight:
                _normalize(x + at, weight, root, width // LANES, results + at)


def _rotate(counter, x, cos, sin, rows, heads, width, results):
    """Write the rotated heads [rows, heads, width], by the angles [rows, width / 2]."""
    while True:
        start = take(counter, 1) * ROWS
        if start >= rows:
            return
        for row in range(start, min(start + ROWS, rows)):
            angle = 2 * row * width
            for head in range(row * heads, (row + 1) * heads):
                at = 2 * head * width
                _rotate_head(x + at, cos + angle, sin + angle, width // (2 * LANES), results + at)


class PositionLoops(NamedTuple):
    """The compiled loops of this module."""

    norm: Callable[..., None]
    rotate: Callable[..., None]


def compile_all() -> PositionLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    address = types.int64
    return PositionLoops(
        compile_loop(_norm, *[address] * 5, types.float32, address, address),
        compile_loop(_rotate, *[address] * 8),
    )
