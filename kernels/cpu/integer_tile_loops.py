"""Products of many rows with MXFP4 matrices in integers, which AVX-512 multiplies faster than float32.

A group of 32 inputs of a row becomes 16-bit integers times one power of two, so that its largest input lies between
2^14 and 2^15. An input of bfloat16 not below 1/128 of the largest is exact; a smaller one is rounded to 2^-15 of the
largest. Twice a value of MXFP4 is an integer of at most 12. A sum over a group is therefore exact: its integer, below
2^24, is exact in float32 too, and so are its products with both powers of two. Sums over the groups are in float32, in
the order of the groups, whatever the number of rows. NaN or infinity among its inputs makes a row's results NaN; what
is below 2^-127 becomes 0.

A tile is 32 outputs by 256 inputs. An instruction adds the products of two neighbouring inputs for 16 outputs, so that
inputs and values are pairs: tile [group, pair, output], inputs [group, pair, row], of two 16-bit integers. What follows
the 16 pairs of a group are the scales, of outputs and of rows, in float32. Jobs and blocks are those of `tile_jobs`.

Measured, one thread (Emerald Rapids), a matrix of 5760 × 2880: 9 rows 2.3 ms, 24 rows 4.0 ms, 256 rows 32 ms
(264 GFLOP/s), and as products in float32, 3.1, 6.0 and 56 ms in the same run; the errors against float64 are equal.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.tile_jobs import (
    JOB_ROWS,
    OUTPUTS,
    ROW_BYTES,
    ask_for_rows,
    block_products,
    clear,
    field,
    row_at,
    store_results,
)
from workbench.kernels.cpu.vectors import (
    E2M1,
    GROUP,
    LANES,
    Value,
    _broadcast,
    _f32,
    _floats,
    _function,
    _i8,
    _i16,
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
PAIRS = GROUP // 2
GROUP_NUMBERS = PAIRS + 1  # of 32 bits: those of a group and its scale
GROUP_BYTES = ROW_BYTES * GROUP_NUMBERS
TILE_BYTES = GROUP_BYTES * DEPTH
THREAD_BYTES = TILE_BYTES + ROW_BYTES * JOB_ROWS
_words = ir.VectorType(_i16, 2 * LANES)
_LEAST, _NOT_FINITE = 15, 255  # exponents of bfloat16, biased
_SQUARES = 0.995 * 2.0**31  # at most; after rounding to integers, too, the sum of squares is below 2^31


def _scale_factors(b: Any, scales: Value, groups: Value) -> Value:
    """Return the powers of two of one group of 16 outputs: 255 is NaN, and 0 the subnormal 2^-127."""
    exponents = ir.Constant(ir.VectorType(_i8, LANES), ir.Undefined)
    for output in range(LANES):
        exponent = _load(b, _i8, scales, b.mul(_int(output), groups))
        exponents = b.insert_element(exponents, exponent, ir.Constant(_i32, output))
    wide = b.zext(exponents, _ints)
    bits = b.shl(wide, _repeat(_ints, 23))
    bits = b.select(b.icmp_unsigned("==", wide, _repeat(_ints, 0)), _repeat(_ints, 0x00400000), bits)
    bits = b.select(b.icmp_unsigned("==", wide, _repeat(_ints, 255)), _repeat(_ints, 0x7FC00000), bits)
    return b.bitcast(bits, _floats)


def _dwords_by_output(b: Any, rows: list[Value]) -> list[Value]:
    """Return of 16 rows of four 32-bit integers the four columns."""

    def joined(parts: list[Value]) -> Value:
        while len(parts) > 1:
            lanes = ir.Constant(ir.VectorType(_i32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
            parts = [b.shuffle_vector(parts[i], parts[i + 1], lanes) for i in range(0, len(parts), 2)]
        return parts[0]

    quads = [joined(rows[start : start + 4]) for start in range(0, LANES, 4)]  # four rows each
    columns = []
    for first in (0, 2):
        lanes = [4 * row + column for column in (first, first + 1) for row in range(8)]
        halves = [b.shuffle_vector(quads[i], quads[i + 1], ir.Constant(_ints, lanes)) for i in (0, 2)]
        for start in (0, 8):
            order = [*range(start, start + 8), *range(LANES + start, LANES + start + 8)]
            columns.append(b.shuffle_vector(*halves, ir.Constant(_ints, order)))
    return columns


def _permuted(b: Any, table: list[int], index: Value) -> Value:
    """Return for each of 16 indices, of which four bits count, an integer of a table."""
    permute = _function(b, "llvm.x86.avx512.permvar.si.512", _ints, _ints, _ints)
    return b.call(permute, [ir.Constant(_ints, table), index])


@intrinsic
def _unpack_group(typingctx, blocks, scales, groups, result):
    """Write a group of 16 outputs of an MXFP4 matrix, and their scales, into 17 rows of a tile."""
    doubled = [round(2 * sign * value) for sign in (1, -1) for value in E2M1]

    def generate(context, b, signature, arguments):
        blocks, scales, groups, result = arguments
        rows = [
            _load(b, ir.VectorType(_i32, 4), blocks, b.mul(_int(LANES * output), groups)) for output in range(LANES)
        ]
        low, high = [value & 0xFFFF for value in doubled], [(value & 0xFFFF) << 16 for value in doubled]
        pairs = [
            b.or_(
                _permuted(b, low, b.lshr(column, _repeat(_ints, 8 * byte))),
                _permuted(b, high, b.lshr(column, _repeat(_ints, 8 * byte + 4))),
            )
            for column in _dwords_by_output(b, rows)
            for byte in range(4)
        ]
        halved = b.fmul(_scale_factors(b, scales, groups), _repeat(_floats, 0.5))
        for position, row in enumerate([*pairs, b.bitcast(halved, _ints)]):
            b.store(row, _pointer(b, _ints, result, _int(ROW_BYTES * position)), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def fitted(b: Any, exponents: Value, values: list[Value], squares: Callable[[list[Value]], Value] | None) -> Any:
    """Return float32 vectors as integers of 16 bits, and in each lane the power of two that these are multiples of.

    exponents: of the largest of the numbers of the lane's group, as bfloat16 has it. squares: returns the sum of the
    squares of a half of them, the larger one, where it is limited.
    """
    finite = b.icmp_unsigned("<", exponents, _repeat(_ints, _NOT_FINITE))
    exponents = b.select(b.icmp_unsigned("<", exponents, _repeat(_ints, _LEAST)), _repeat(_ints, _LEAST), exponents)

    def scaled() -> list[Value]:
        factor = b.shl(b.sub(_repeat(_ints, 268), exponents), _repeat(_ints, 23))  # 2^(14 - exponent)
        return [b.fmul(value, b.bitcast(factor, _floats)) for value in values]

    if squares:
        total = squares(scaled())
        for limit in (_SQUARES, 4 * _SQUARES):
            above = b.fcmp_ordered(">", total, _repeat(_floats, limit))
            exponents = b.add(exponents, b.zext(above, _ints))
    nearest = _function(b, "llvm.x86.avx512.mask.cvtps2dq.512", _ints, _floats, _ints, _i16, _i32)
    rest = (_repeat(_ints, 0), ir.Constant(_i16, -1), ir.Constant(_i32, 4))  # all lanes, to the nearest
    integers = [b.call(nearest, [value, *rest]) for value in scaled()]
    powers = b.shl(b.sub(exponents, _repeat(_ints, 14)), _repeat(_ints, 23))
    return integers, b.bitcast(b.select(finite, powers, _repeat(_ints, 0x7FC00000)), _floats)


def widened_pairs(b: Any, pairs: Value) -> list[Value]:
    """Return the first and the second of pairs of bfloat16, as float32."""
    halves = b.shl(pairs, _repeat(_ints, 16)), b.and_(pairs, _repeat(_ints, 0xFFFF0000))
    return [b.bitcast(half, _floats) for half in halves]


def paired(b: Any, first: Value, second: Value) -> Value:
    """Return pairs of integers of 16 bits."""
    return b.or_(b.and_(first, _repeat(_ints, 0xFFFF)), b.shl(second, _repeat(_ints, 16)))


def larger(b: Any, first: Value, second: Value) -> Value:
    """Return the larger number in each lane."""
    return b.select(b.fcmp_ordered(">", second, first), second, first)


def sum_of_squares(b: Any, values: list[Value]) -> Value:
    """Return the sum over vectors in each lane."""
    sums = [b.fmul(value, value) for value in values]
    while len(sums) > 1:
        sums = [b.fadd(*sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]


def _rounding(limited: bool) -> Any:
    """Return an intrinsic: write 32 bfloat16 inputs of a row as 16 pairs of integers and a scale, `rows` numbers apart.

    limited: whether the sum of squares of a half of the integers is limited.
    """

    @intrinsic
    def round_group(typingctx, source, rows, result):
        def generate(context, b, signature, arguments):
            source, rows, result = arguments
            bits = _load(b, _words, source)
            exponents = b.and_(bits, ir.Constant(_words, [0x7F80] * 2 * LANES))
            largest = _function(b, "llvm.vector.reduce.umax.v32i16", _i16, _words)
            exponent = b.zext(b.lshr(b.call(largest, [exponents]), ir.Constant(_i16, 7)), _i32)

            def squares(values: list[Value]) -> Value:
                sums = sum_of_squares(b, values)
                for step in (1, 2, 4):  # within each half
                    sums = b.fadd(sums, exchanged(sums, step))
                return larger(b, sums, exchanged(sums, LANES // 2))

            def exchanged(vector: Value, step: int) -> Value:
                return b.shuffle_vector(vector, vector, ir.Constant(_ints, [lane ^ step for lane in range(LANES)]))

            values = widened_pairs(b, b.bitcast(bits, _ints))
            integers, powers = fitted(b, _broadcast(b, exponent), values, squares if limited else None)
            pairs, step = paired(b, *integers), b.mul(rows, _int(4))
            for pair in range(PAIRS):
                value = b.extract_element(pairs, ir.Constant(_i32, pair))
                b.store(value, _pointer(b, _i32, result, b.mul(step, _int(pair))), align=4)
            power = b.extract_element(powers, ir.Constant(_i32, 0))
            b.store(power, _pointer(b, _f32, result, b.mul(step, _int(PAIRS))), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return round_group


_round_group, _round_limited_group = _rounding(limited=False), _rounding(limited=True)


def products_of(parts: int, rows: int) -> Any:
    """Return an intrinsic: add to the sums of `rows` rows their products with a tile.

    parts: of a group, that are added up in integers. Arguments of the intrinsic: the addresses of the tile, of a block
    of inputs [group, pair, row] and of sums [row, 32], and how many groups.
    """

    @intrinsic
    def products(typingctx, tile, inputs, sums, groups):
        def generate(context, b, signature, arguments):
            tile, inputs, sums, groups = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            multiply_pairs = _function(b, "llvm.x86.avx512.pmaddw.d.512", _ints, _words, _words)
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
                        weights = [b.load(_pointer(b, _words, values, at, _int(64 * n)), align=64) for n in (0, 1)]
                        for row in range(rows):
                            pair = b.bitcast(_broadcast(b, _load(b, _i32, x, first, _int(4 * row))), _words)
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


_add_products = block_products(partial(products_of, 1), GROUP_NUMBERS)


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
                        _round_limited_group(at, rows, result)
                    else:
                        _round_group(at, rows, result)


def _multiply(counter, memory, jobs, number, targets, packed, scales, groups, outputs, inputs, bias, results):
    """Multiply the arranged inputs of jobs by their MXFP4 matrices [outputs, groups].

    memory: of the threads, after a counter that shares it out. results: bfloat16 [..., outputs], of which `targets` are
    the rows at the positions of the jobs.
    """
    tile = memory + 64 + THREAD_BYTES * take(memory, 1)
    sums, tiles = tile + TILE_BYTES, outputs // OUTPUTS
    while True:
        item = take(counter, 1)
        if item >= number * tiles:
            return
        job, output = item // tiles, item % tiles * OUTPUTS
        blocks, rows = field(jobs, job, 3), field(jobs, job, 4)
        x = inputs + 4 * GROUP_NUMBERS * field(jobs, job, 5) * groups
        base = field(jobs, job, 0) * outputs + output
        clear(sums, blocks * rows)
        for start in range(0, groups, DEPTH):
            depth = min(DEPTH, groups - start)
            if start + depth < groups:
                ask_for_rows(packed + 16 * (base * groups + start + depth), 16 * groups, 16 * DEPTH)
            else:
                ask_for_rows(packed + 16 * (base + OUTPUTS) * groups, 16 * groups, 16 * DEPTH)
                ask_for_rows(scales + (base + OUTPUTS) * groups, groups, groups)
            for group in range(depth):
                for vector in range(OUTPUTS // LANES):
                    at = (base + LANES * vector) * groups + start + group
                    _unpack_group(packed + 16 * at, scales + at, groups, tile + GROUP_BYTES * group + 64 * vector)
            _add_products(tile, x + 4 * GROUP_NUMBERS * start * blocks * rows, sums, depth, blocks, rows)
        store_results(sums, jobs, job, targets, bias, outputs, output, results)


class IntegerTileLoops(NamedTuple):
    """The compiled loops of this module."""

    arrange: Callable[..., None]
    multiply: Callable[..., None]


def compile_all() -> IntegerTileLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    return IntegerTileLoops(compile_loop(_arrange, *[types.int64] * 9), compile_loop(_multiply, *[types.int64] * 12))
