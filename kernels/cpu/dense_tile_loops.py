"""Products of many rows with bfloat16 matrices in float32, by tiles: the jobs are those of `tile_jobs`.

A tile is 32 outputs by 128 inputs in float32 (16 KB), a row of 32 outputs for each input; inputs are [tile, block,
input, row]. A result is the sum over the inputs in their order, whatever the number of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.row_loops import bfloat16_at, set_float
from workbench.kernels.cpu.tile_jobs import (
    JOB_ROWS,
    OUTPUTS,
    ROW_BYTES,
    ask_for_rows,
    block_products,
    clear,
    field,
    store_results,
)
from workbench.kernels.cpu.vectors import (
    GROUP,
    LANES,
    Value,
    _broadcast,
    _f32,
    _floats,
    _function,
    _i64,
    _int,
    _ints,
    _load,
    _pointer,
    _repeat,
    _transposed,
    take,
)

DEPTH = 128  # inputs of a tile
_TILE_BYTES = ROW_BYTES * DEPTH
THREAD_BYTES = _TILE_BYTES + ROW_BYTES * JOB_ROWS


def _store_inputs(b: Any, values: list[Value], result: Value) -> None:
    """Write vectors of 16 outputs, one for each input in order, into neighbouring rows of a tile."""
    for position, value in enumerate(values):
        b.store(value, _pointer(b, value.type, result, _int(ROW_BYTES * position)), align=64)


@intrinsic
def widen_group(typingctx, matrix, width, result):
    """Write 32 inputs of 16 outputs of a bfloat16 matrix into 32 rows of a tile."""

    def generate(context, b, signature, arguments):
        matrix, width, result = arguments
        rows = [_load(b, _ints, matrix, b.mul(width, _int(2 * output))) for output in range(LANES)]
        values = []
        for pair in _transposed(b, rows):
            values += [b.shl(pair, _repeat(_ints, 16)), b.and_(pair, _repeat(_ints, 0xFFFF0000))]
        _store_inputs(b, values, result)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def float_products(rows: int) -> Any:
    """Return an intrinsic: add to the sums of `rows` rows their products with a tile.

    Its arguments: the addresses of the tile, of a block of inputs [input, row] and of sums [row, 32], and how many
    inputs.
    """

    @intrinsic
    def products(typingctx, tile, inputs, sums, depth):
        def generate(context, b, signature, arguments):
            tile, inputs, sums, depth = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            at = [_pointer(b, _floats, sums, _int(4 * LANES * vector)) for vector in range(2 * rows)]
            totals = [cgutils.alloca_once_value(b, _repeat(_floats, 0.0)) for _ in at]
            for total, source in zip(totals, at, strict=True):
                b.store(b.load(source, align=64), total)
            with cgutils.for_range(b, depth, intp=_i64) as loop:
                start = b.mul(loop.index, _int(ROW_BYTES))
                weights = [b.load(_pointer(b, _floats, tile, start, _int(64 * half)), align=64) for half in (0, 1)]
                first = b.mul(loop.index, _int(4 * rows))
                for row in range(rows):
                    value = _broadcast(b, _load(b, _f32, inputs, first, _int(4 * row)))
                    for half in (0, 1):
                        total = totals[2 * row + half]
                        b.store(b.call(multiply_add, [weights[half], value, b.load(total)]), total)
            for total, target in zip(totals, at, strict=True):
                b.store(b.load(total), target, align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return products


_add_products = block_products(float_products, 1)


def _arrange(counter, jobs, number, most, source, width, inputs):
    """Put the bfloat16 rows [..., width] of jobs into blocks of float32 rows; the last row again where one is missing.

    number: of the jobs, with at most `most` blocks each.
    """
    while True:
        item = take(counter, 1)
        if item >= number * most:
            return
        job, block = item // most, item % most
        first, count = field(jobs, job, 1), field(jobs, job, 2)
        blocks, rows = field(jobs, job, 3), field(jobs, job, 4)
        if block >= blocks:
            continue
        before = inputs + 4 * field(jobs, job, 5) * width
        for start in range(0, width, DEPTH):
            depth = min(DEPTH, width - start)
            target = before + 4 * (start * blocks * rows + block * depth * rows)
            for row in range(rows):
                position = first + min(block * rows + row, count - 1)
                at = source + 2 * (position * width + start)
                for i in range(depth):
                    set_float(target + 4 * (i * rows + row), bfloat16_at(at + 2 * i))


def _multiply(counter, memory, jobs, number, matrix, width, outputs, inputs, bias, results):
    """Multiply the arranged inputs of jobs by a bfloat16 matrix [outputs, width].

    memory: of the threads, after a counter that shares it out. results: bfloat16 [..., outputs].
    """
    tile = memory + 64 + THREAD_BYTES * take(memory, 1)
    sums, tiles = tile + _TILE_BYTES, outputs // OUTPUTS
    while True:
        item = take(counter, 1)
        if item >= number * tiles:
            return
        job, output = item // tiles, item % tiles * OUTPUTS
        blocks, rows = field(jobs, job, 3), field(jobs, job, 4)
        x = inputs + 4 * field(jobs, job, 5) * width
        clear(sums, blocks * rows)
        for start in range(0, width, DEPTH):
            depth = min(DEPTH, width - start)
            if start + depth < width:
                ask_for_rows(matrix + 2 * (output * width + start + depth), 2 * width, 2 * DEPTH)
            else:
                ask_for_rows(matrix + 2 * (output + OUTPUTS) * width, 2 * width, 2 * DEPTH)
            for first in range(0, depth, GROUP):
                for vector in range(OUTPUTS // LANES):
                    at = matrix + 2 * ((output + LANES * vector) * width + start + first)
                    widen_group(at, width, tile + ROW_BYTES * first + 64 * vector)
            _add_products(tile, x + 4 * start * blocks * rows, sums, depth, blocks, rows, 1, _TILE_BYTES)
        store_results(sums, jobs, job, 0, bias, outputs, output, results)


class DenseTileLoops(NamedTuple):
    """The compiled loops of this module."""

    arrange: Callable[..., None]
    multiply: Callable[..., None]


def compile_all() -> DenseTileLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    return DenseTileLoops(compile_loop(_arrange, *[types.int64] * 7), compile_loop(_multiply, *[types.int64] * 10))
