"""Loops compiled for this processor: inner products of a few rows with MXFP4 and with bfloat16 matrices.

A matrix is read once, in the order of memory, and each of its values is widened to float32 in registers, as
`workbench.kernels.cpu.vectors` explains.

The sum over the inputs has the same order for one row as for 32: a row's result does not depend on the other rows.

Measured, one thread (Zen 4, in cache): 25 · 10^9 values of MXFP4 a second with AVX-512, 11 · 10^9 with AVX2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.vectors import (
    GROUP,
    LANES,
    Builder,
    Pair,
    Reader,
    Value,
    _f32,
    _floats,
    _function,
    _i64,
    _int,
    _ints,
    _load,
    _pointer,
    _prefetch,
    _repeat,
    _words,
    integer,
    mxfp4_reader,
    take,
)


def _bfloat16(context: Any, b: Builder, arguments: tuple[Value, ...]) -> Reader:
    """Return a reader of 32 consecutive values, in two halves."""
    matrix, groups = arguments

    def read(group: Value, row: int) -> Pair:
        at = b.mul(b.add(b.mul(_int(row), groups), group), _int(2 * GROUP))

        def half(offset: int) -> Value:
            bits = b.zext(_load(b, _words, matrix, at, _int(offset)), _ints)
            return b.bitcast(b.shl(bits, _repeat(_ints, 16)), _floats)

        return half(0), half(2 * LANES)

    return read, lambda low, high: (low, high)


def _inner_products(reader: Callable[..., Any], sources: int, ahead: int, outputs: int, rows: int) -> Any:
    """Return an intrinsic: inner products of `outputs` rows of a matrix with `rows` rows of inputs.

    ahead: bytes of a group; with them, the groups of the next `outputs` rows are asked for while these are read. The
    processor itself does not foresee that the rows of a tile are read side by side, nor what follows a page of memory.
    Measured, two threads (Emerald Rapids), one row of bfloat16: 16.5 GB/s without, 20.9 GB/s with it. 0: none.
    Its arguments: the address of each row of inputs, the addresses where the results of each row go, the number of
    groups of 32, and the `sources` arguments of the reader but the groups. Inputs are float32 in the reader's order.
    """

    @intrinsic
    def tile(typingctx, inputs, results, groups, source):
        count = types.UniTuple(types.int64, rows)
        signature = types.void(count, count, types.int64, types.UniTuple(types.int64, sources))

        def generate(context, b, signature, arguments):
            inputs, results = (cgutils.unpack_tuple(b, pair, rows) for pair in arguments[:2])
            groups, source = arguments[2], cgutils.unpack_tuple(b, arguments[3], sources)
            read, ordered = reader(context, b, (*source, groups))
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            add_up = _function(b, "llvm.vector.reduce.fadd.v16f32", _f32, _f32, _floats)
            zero = _repeat(_floats, 0.0)
            # Two sums for each pair of rows: a sum waits for its predecessor, two wait half as long.
            sums = [[[cgutils.alloca_once_value(b, zero) for _ in range(2)] for _ in inputs] for _ in range(outputs)]
            with cgutils.for_range(b, groups, intp=_i64) as loop:
                start = b.mul(loop.index, _int(4 * GROUP))
                if ahead:
                    _prefetch(b, source[0], b.mul(b.add(groups, loop.index), _int(outputs * ahead)))
                values = [[_load(b, _floats, at, start, _int(4 * LANES * half)) for half in (0, 1)] for at in inputs]
                for output in range(outputs):
                    weights = read(loop.index, output)
                    for row, half in ((row, half) for row in range(rows) for half in (0, 1)):
                        total = sums[output][row][half]
                        b.store(b.call(multiply_add, [weights[half], values[row][half], b.load(total)]), total)
            for output in range(outputs):
                for row in range(rows):
                    total = b.fadd(*ordered(*(b.load(part) for part in sums[output][row])))
                    total = b.call(add_up, [ir.Constant(_f32, 0.0), total], fastmath=("reassoc",))
                    b.store(total, _pointer(b, _f32, results[row], _int(4 * output)), align=1)
            return context.get_dummy_value()

        return signature, generate

    return tile


# Outputs at a time: a matrix in bfloat16 is read fastest as one stream, and unpacking a few rows of MXFP4 hides
# the latency of loads. With four rows of inputs, two outputs leave registers free.
MXFP4_OUTPUTS, MXFP4_OUTPUTS_FOR_FOUR, BFLOAT16_OUTPUTS_FOR_FOUR = 4, 2, 2
_mxfp4_by_one, _mxfp4_by_two, _mxfp4_by_four = (
    _inner_products(mxfp4_reader, 6, LANES, outputs, rows)
    for outputs, rows in ((MXFP4_OUTPUTS, 1), (MXFP4_OUTPUTS_FOR_FOUR, 2), (MXFP4_OUTPUTS_FOR_FOUR, 4))
)
_bfloat16_by_one, _bfloat16_by_four = (
    _inner_products(_bfloat16, 1, ahead, outputs, rows)
    for ahead, outputs, rows in ((2 * GROUP, 1, 1), (0, BFLOAT16_OUTPUTS_FOR_FOUR, 4))
)
SMALLEST = 4  # outputs of a matrix: the last tile is moved back instead of being cut


@njit(nogil=True)
def dense_chunk(start, stop, matrix, outputs, groups, inputs, rows, results):
    """Inner products of `rows` rows with rows `start` to `stop` of a bfloat16 matrix [outputs, 32 · groups].

    inputs: float32 [rows, 32 · groups]. results: float32 [rows, outputs].
    """
    width = groups * 32
    if rows == 1:
        for n in range(start, stop):
            _bfloat16_by_one((inputs,), (results + 4 * n,), groups, (matrix + 2 * n * width,))
        return
    for tile in range(start, stop, 2):
        n = min(tile, outputs - 2)
        source = (matrix + 2 * n * width,)
        for row in range(0, rows, 4):
            a, b, c, d = row, min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
            _bfloat16_by_four(
                (inputs + 4 * a * width, inputs + 4 * b * width, inputs + 4 * c * width, inputs + 4 * d * width),
                (
                    results + 4 * (a * outputs + n),
                    results + 4 * (b * outputs + n),
                    results + 4 * (c * outputs + n),
                    results + 4 * (d * outputs + n),
                ),
                groups,
                source,
            )


def _dense_rows(counter, chunk, matrix, outputs, groups, inputs, rows, results):
    """Inner products of `rows` rows with a bfloat16 matrix, of which `chunk` outputs are taken at a time."""
    while True:
        start = take(counter, chunk)
        if start >= outputs:
            return
        dense_chunk(start, min(start + chunk, outputs), matrix, outputs, groups, inputs, rows, results)


@njit(nogil=True)
def expert_chunk(
    item, chunk, blocks, scales, table, block, scale, halves, outputs, groups, inputs, results, order, shared, experts,
    ends,
):  # fmt: skip
    """Inner products of the slots of one expert with `chunk` rows of its packed matrix [outputs, groups, 16].

    item: the chunk, counted over all experts that have slots. block, scale: bytes from one group to the next, of the
    matrix and of its scales. halves: whether byte j holds positions j and j + 16 of its group, instead of 2j and
    2j + 1. inputs: float32 [slots / shared, groups, 2, 16], the positions in the low halves of each group's bytes
    before those in the high halves. results: float32 [slots, outputs]. order: the slots, sorted by expert. shared:
    slots that read one row of inputs. experts, ends: which experts have slots, and where the slots of each end in
    `order`.
    """
    chunks = (outputs + chunk - 1) // chunk
    width = groups * 32
    hit = item // chunks
    start = item % chunks * chunk
    stop = min(start + chunk, outputs)
    expert = integer(experts + 8 * hit)
    first = integer(ends + 8 * hit - 8) if hit else 0
    last = integer(ends + 8 * hit) - 1
    base = expert * outputs
    step = 4 if first == last else 2
    for tile in range(start, stop, step):
        n = min(tile, outputs - step)
        at = (base + n) * groups
        source = (blocks + at * block, scales + at * scale, table, block, scale, halves)
        if first == last:
            slot = integer(order + 8 * first)
            _mxfp4_by_one(
                (inputs + 4 * (slot // shared) * width,), (results + 4 * (slot * outputs + n),), groups, source
            )
            continue
        for position in range(first, last + 1, 4):
            a = integer(order + 8 * position)
            b = integer(order + 8 * min(position + 1, last))
            if last - position < 2:
                _mxfp4_by_two(
                    (inputs + 4 * (a // shared) * width, inputs + 4 * (b // shared) * width),
                    (results + 4 * (a * outputs + n), results + 4 * (b * outputs + n)),
                    groups,
                    source,
                )
                continue
            c = integer(order + 8 * (position + 2))
            d = integer(order + 8 * min(position + 3, last))
            _mxfp4_by_four(
                (
                    inputs + 4 * (a // shared) * width,
                    inputs + 4 * (b // shared) * width,
                    inputs + 4 * (c // shared) * width,
                    inputs + 4 * (d // shared) * width,
                ),
                (
                    results + 4 * (a * outputs + n),
                    results + 4 * (b * outputs + n),
                    results + 4 * (c * outputs + n),
                    results + 4 * (d * outputs + n),
                ),
                groups,
                source,
            )


def _expert_rows(
    counter, chunk, blocks, scales, table, block, scale, halves, outputs, groups, inputs, results, order, shared, hits,
    experts, ends,
):  # fmt: skip
    """Inner products of every slot's row with its expert's packed matrix, where `hits` experts have slots."""
    items = hits * ((outputs + chunk - 1) // chunk)
    while True:
        item = take(counter, 1)
        if item >= items:
            return
        expert_chunk(
            item, chunk, blocks, scales, table, block, scale, halves, outputs, groups, inputs, results, order, shared,
            experts, ends,
        )  # fmt: skip


class Loops(NamedTuple):
    """The compiled loops of this module."""

    dense_rows: Callable[..., None]
    expert_rows: Callable[..., None]


def compile_all() -> Loops:
    """Return the compiled loops: from the cache on disk if it has them."""
    return Loops(compile_loop(_dense_rows, *[types.int64] * 8), compile_loop(_expert_rows, *[types.int64] * 17))
