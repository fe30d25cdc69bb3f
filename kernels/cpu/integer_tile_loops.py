"""Products of many rows with MXFP4 and bfloat16 matrices in integers, which AVX-512 multiplies faster than float32.

Groups of 32 inputs are integers as `integer_groups` makes them. A sum over a group is exact: with MXFP4 its integer,
below 2^24, is exact in float32 too, and so are its products with both powers of two; with bfloat16 two sums over 16
inputs, below 2^31, are added in float32.
Sums over the groups are in float32, in the order of the groups, whatever the number of rows. NaN or infinity among its
inputs makes a row's results NaN, and among those of an output of a matrix the results of this output. Rows with numbers
above 2^111 give infinity or NaN.

A tile is 32 outputs by 256 inputs. An instruction adds the products of two neighbouring inputs for 16 outputs, so that
inputs and values are pairs: tile [group, pair, output], inputs [group, pair, row], of two 16-bit integers. What follows
the 16 pairs of a group are the scales, of outputs and of rows, in float32. Jobs and blocks are those of `tile_jobs`.
A block of inputs meets up to three tiles while it is in the nearest cache: it comes from the farthest, which is slower
than the products of one tile.

Measured, one thread (Emerald Rapids), a matrix of 5760 × 2880 of MXFP4: 24 rows 4.3 ms, 512 rows 65 ms (260 GFLOP/s),
one tile at a time 69 ms. A matrix of 4096 × 2880 of bfloat16 and 1,024 rows: 114 ms (212 GFLOP/s).
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.integer_groups import (
    GROUP_NUMBERS,
    PAIRS,
    round_group,
    round_group_of_outputs,
    round_limited_group,
    unpack_group_of_outputs,
    words,
)
from workbench.kernels.cpu.tile_jobs import (
    JOB_ROWS,
    OUTPUTS,
    ROW_BYTES,
    ask_for_rows,
    block_products,
    clear,
    field,
    inline,
    row_at,
    store_results,
)
from workbench.kernels.cpu.vectors import (
    GROUP,
    LANES,
    _broadcast,
    _f32,
    _floats,
    _function,
    _i32,
    _i64,
    _int,
    _ints,
    _load,
    _pointer,
    _repeat,
    take,
)

DEPTH = 8  # groups of a tile
TOGETHER = 3  # tiles that meet a block of inputs
GROUP_BYTES = ROW_BYTES * GROUP_NUMBERS
TILE_BYTES = GROUP_BYTES * DEPTH
SUM_BYTES = ROW_BYTES * JOB_ROWS
THREAD_BYTES = TOGETHER * (TILE_BYTES + SUM_BYTES)


def _products(parts: int, rows: int) -> Any:
    """Return an intrinsic: add to the sums of `rows` rows their products with a tile.

    parts: of a group, that are added up in integers. Arguments of the intrinsic: the addresses of the tile, of a block
    of inputs [group, pair, row] and of sums [row, 32], and how many groups.
    """

    @intrinsic
    def products(typingctx, tile, inputs, sums, groups):
        def generate(context, b, signature, arguments):
            tile, inputs, sums, groups = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            multiply_pairs = _function(b, "llvm.x86.avx512.pmaddw.d.512", _ints, words, words)
            totals = [cgutils.alloca_once_value(b, _repeat(_ints, 0)) for _ in range(2 * rows)]
            with cgutils.for_range(b, groups, intp=_i64) as loop:
                values = b.add(tile, b.mul(loop.index, _int(GROUP_BYTES)))
                x = b.add(inputs, b.mul(loop.index, _int(4 * rows * GROUP_NUMBERS)))
                sums_of_parts = []
                for part in range(parts):
                    for total in totals:
                        b.store(_repeat(_ints, 0), total)
                    with cgutils.for_range_slice(
                        b, _int(PAIRS // parts * part), _int(PAIRS // parts * (part + 1)), _int(1), intp=_i64
                    ) as (index, _):
                        at, first = b.mul(index, _int(ROW_BYTES)), b.mul(index, _int(4 * rows))
                        weights = [b.load(_pointer(b, words, values, at, _int(64 * n)), align=64) for n in (0, 1)]
                        for row in range(rows):
                            pair = b.bitcast(_broadcast(b, _load(b, _i32, x, first, _int(4 * row))), words)
                            for half in (0, 1):
                                total = totals[2 * row + half]
                                b.store(b.add(b.call(multiply_pairs, [weights[half], pair]), b.load(total)), total)
                    sums_of_parts.append([b.sitofp(b.load(total), _floats) for total in totals])
                products = [reduce(b.fadd, same) for same in zip(*sums_of_parts, strict=True)]
                at = [_int(ROW_BYTES * PAIRS + 64 * half) for half in (0, 1)]
                scales = [b.load(_pointer(b, _floats, values, offset), align=64) for offset in at]
                for row in range(rows):
                    scale = _broadcast(b, _load(b, _f32, x, _int(4 * (rows * PAIRS + row))))
                    for half in (0, 1):
                        target = _pointer(b, _floats, sums, _int(ROW_BYTES * row + 64 * half))
                        total = b.fmul(products[2 * row + half], scale)
                        b.store(b.call(multiply_add, [total, scales[half], b.load(target, align=64)]), target, align=64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return products


_add_packed_products = block_products(partial(_products, 1), GROUP_NUMBERS)
_add_dense_products = block_products(partial(_products, 2), GROUP_NUMBERS)


def _arrange(counter, jobs, number, most, sources, x, groups, limited, inputs):
    """Put the bfloat16 rows x [..., inputs] of jobs into blocks of integers; the last row again where one is missing.

    number: of the jobs, with at most `most` blocks each. sources: the rows of x at the positions of the jobs. limited:
    whether the sum of squares of half a group of integers is limited.
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
        before = inputs + 4 * GROUP_NUMBERS * field(jobs, job, 5) * groups
        for start in range(0, groups, DEPTH):
            depth = min(DEPTH, groups - start)
            target = before + 4 * GROUP_NUMBERS * rows * (start * blocks + block * depth)
            for row in range(rows):
                position = first + min(block * rows + row, count - 1)
                source = x + 2 * GROUP * (groups * row_at(sources, position) + start)
                for group in range(depth):
                    at, result = source + 2 * GROUP * group, target + 4 * (GROUP_NUMBERS * rows * group + row)
                    if limited:
                        round_limited_group(at, rows, result)
                    else:
                        round_group(at, rows, result)


@inline
def _fill_tile(matrix, scales, groups, output, start, depth, tile):
    """Write `depth` groups of 32 outputs of a matrix into a tile, and ask for the ones after them.

    matrix, scales: those of all outputs of MXFP4, or a bfloat16 matrix and 0.
    """
    last = start + depth == groups
    row, group = (output + OUTPUTS, 0) if last else (output, start + depth)
    size = GROUP * groups
    if scales:
        ask_for_rows(matrix + 16 * (row * groups + group), 16 * groups, 16 * DEPTH)
        if last:
            ask_for_rows(scales + row * groups, groups, groups)
    else:
        ask_for_rows(matrix + 2 * (row * size + GROUP * group), 2 * size, 2 * GROUP * DEPTH)
    for group in range(depth):
        for vector in range(OUTPUTS // LANES):
            at = (output + LANES * vector) * groups + start + group
            result = tile + GROUP_BYTES * group + 64 * vector
            if scales:
                unpack_group_of_outputs(matrix + 16 * at, scales + at, groups, result)
            else:
                round_group_of_outputs(matrix + 2 * GROUP * at, size, result)


def _multiply(
    counter, memory, jobs, number, together, targets, matrix, scales, groups, outputs, inputs, bias, results
):  # fmt: skip
    """Multiply the arranged inputs of jobs by their matrices [outputs, groups], of MXFP4 or, without scales, bfloat16.

    memory: of the threads, after a counter that shares it out. together: how many tiles are multiplied at a time, at
    most `TOGETHER`. results: bfloat16 [..., outputs], of which `targets` are the rows at the positions of the jobs.
    """
    tiles = memory + 64 + THREAD_BYTES * take(memory, 1)
    sums, count = tiles + TOGETHER * TILE_BYTES, outputs // OUTPUTS
    items = (count + together - 1) // together
    while True:
        item = take(counter, 1)
        if item >= number * items:
            return
        job, tile = item // items, item % items * together
        some = min(together, count - tile)
        blocks, rows = field(jobs, job, 3), field(jobs, job, 4)
        x = inputs + 4 * GROUP_NUMBERS * field(jobs, job, 5) * groups
        base = field(jobs, job, 0) * outputs
        clear(sums, some * blocks * rows)
        for start in range(0, groups, DEPTH):
            depth = min(DEPTH, groups - start)
            for n in range(some):
                output = base + (tile + n) * OUTPUTS
                _fill_tile(matrix, scales, groups, output, start, depth, tiles + n * TILE_BYTES)
            at = x + 4 * GROUP_NUMBERS * start * blocks * rows
            if scales:
                _add_packed_products(tiles, at, sums, depth, blocks, rows, some, TILE_BYTES)
            else:
                _add_dense_products(tiles, at, sums, depth, blocks, rows, some, TILE_BYTES)
        for n in range(some):
            output = (tile + n) * OUTPUTS
            store_results(sums + n * ROW_BYTES * blocks * rows, jobs, job, targets, bias, outputs, output, results)


class IntegerTileLoops(NamedTuple):
    """The compiled loops of this module."""

    arrange: Callable[..., None]
    multiply: Callable[..., None]


def compile_all() -> IntegerTileLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    return IntegerTileLoops(compile_loop(_arrange, *[types.int64] * 9), compile_loop(_multiply, *[types.int64] * 13))
