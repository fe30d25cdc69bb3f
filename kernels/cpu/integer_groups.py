"""Groups of 32 numbers as 16-bit integers times one power of two: of rows, and of MXFP4 and bfloat16 matrices.

A group of 32 inputs of a row has its largest input between 2^14 and 2^15. An input of bfloat16 not below 1/128 of the
largest is exact; a smaller one is rounded to 2^-15 of the largest. Twice a value of MXFP4 is an integer of at most 12.

Groups of a bfloat16 matrix, and of the rows that it multiplies, are *limited*: the squares of the first 16 integers sum
to less than 2^31, and those of the last 16 too, which bounds the integer sum of their products (Cauchy and Schwarz).
Call the larger root of the two sums of squares the norm of a group: numbers not below 1/128 of it are exact, smaller
ones are rounded by at most 2^-15 of it.

NaN or infinity among the numbers of a group makes its power of two NaN. What is below 2^-127 becomes 0.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from workbench.kernels.cpu.tile_jobs import ROW_BYTES
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
    _int,
    _ints,
    _load,
    _pointer,
    _repeat,
    _transposed,
)

PAIRS = GROUP // 2
GROUP_NUMBERS = PAIRS + 1  # of 32 bits: those of a group and its scale
words = ir.VectorType(_i16, 2 * LANES)
_LEAST, _NOT_FINITE = 15, 255  # exponents of bfloat16, biased
_SQUARES = 0.995 * 2.0**31  # at most; after rounding to integers, too, the sum of squares is below 2^31


def _fitted(b: Any, exponents: Value, values: list[Value], squares: Callable[[list[Value]], Value] | None) -> Any:
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


def _widened_pairs(b: Any, pairs: Value) -> list[Value]:
    """Return the first and the second of pairs of bfloat16, as float32."""
    halves = b.shl(pairs, _repeat(_ints, 16)), b.and_(pairs, _repeat(_ints, 0xFFFF0000))
    return [b.bitcast(half, _floats) for half in halves]


def _paired(b: Any, first: Value, second: Value) -> Value:
    """Return pairs of integers of 16 bits."""
    return b.or_(b.and_(first, _repeat(_ints, 0xFFFF)), b.shl(second, _repeat(_ints, 16)))


def _larger(b: Any, first: Value, second: Value) -> Value:
    """Return the larger number in each lane."""
    return b.select(b.fcmp_ordered(">", second, first), second, first)


def _sum_of_squares(b: Any, values: list[Value]) -> Value:
    """Return the sum over vectors in each lane."""
    sums = [b.fmul(value, value) for value in values]
    while len(sums) > 1:
        sums = [b.fadd(*sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]


@intrinsic
def round_group_of_outputs(typingctx, matrix, width, result):
    """Write 32 inputs of 16 outputs of a bfloat16 matrix as pairs of integers, and scales, into 17 rows of a tile."""

    def generate(context, b, signature, arguments):
        matrix, width, result = arguments
        rows = [_load(b, _ints, matrix, b.mul(width, _int(2 * output))) for output in range(LANES)]
        pairs = _transposed(b, rows)
        larger = _function(b, "llvm.umax.v32i16", words, words, words)
        exponents = [b.bitcast(b.and_(pair, _repeat(_ints, 0x7F807F80)), words) for pair in pairs]
        while len(exponents) > 1:
            exponents = [b.call(larger, exponents[i : i + 2]) for i in range(0, len(exponents), 2)]
        both = b.bitcast(exponents[0], _ints)
        low, high = b.and_(both, _repeat(_ints, 0xFFFF)), b.lshr(both, _repeat(_ints, 16))
        largest = b.lshr(b.select(b.icmp_unsigned("<", low, high), high, low), _repeat(_ints, 7))
        values = [value for pair in pairs for value in _widened_pairs(b, pair)]

        def squares(scaled: list[Value]) -> Value:
            return _larger(b, *(_sum_of_squares(b, scaled[at : at + GROUP // 2]) for at in (0, GROUP // 2)))

        integers, powers = _fitted(b, largest, values, squares)
        numbers = [_paired(b, *integers[i : i + 2]) for i in range(0, GROUP, 2)]
        for position, number in enumerate([*numbers, powers]):
            b.store(number, _pointer(b, number.type, result, _int(ROW_BYTES * position)), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


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
def unpack_group_of_outputs(typingctx, blocks, scales, groups, result):
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


def _rounding(limited: bool) -> Any:
    """Return an intrinsic: write 32 bfloat16 inputs of a row as 16 pairs of integers and a scale, `rows` numbers apart.

    limited: whether the sum of squares of a half of the integers is limited.
    """

    @intrinsic
    def round_group(typingctx, source, rows, result):
        def generate(context, b, signature, arguments):
            source, rows, result = arguments
            bits = _load(b, words, source)
            exponents = b.and_(bits, ir.Constant(words, [0x7F80] * 2 * LANES))
            largest = _function(b, "llvm.vector.reduce.umax.v32i16", _i16, words)
            exponent = b.zext(b.lshr(b.call(largest, [exponents]), ir.Constant(_i16, 7)), _i32)

            def squares(values: list[Value]) -> Value:
                sums = _sum_of_squares(b, values)
                for step in (1, 2, 4):  # within each half
                    sums = b.fadd(sums, exchanged(sums, step))
                return _larger(b, sums, exchanged(sums, LANES // 2))

            def exchanged(vector: Value, step: int) -> Value:
                return b.shuffle_vector(vector, vector, ir.Constant(_ints, [lane ^ step for lane in range(LANES)]))

            values = _widened_pairs(b, b.bitcast(bits, _ints))
            integers, powers = _fitted(b, _broadcast(b, exponent), values, squares if limited else None)
            pairs, step = _paired(b, *integers), b.mul(rows, _int(4))
            for pair in range(PAIRS):
                value = b.extract_element(pairs, ir.Constant(_i32, pair))
                b.store(value, _pointer(b, _i32, result, b.mul(step, _int(pair))), align=4)
            power = b.extract_element(powers, ir.Constant(_i32, 0))
            b.store(power, _pointer(b, _f32, result, b.mul(step, _int(PAIRS))), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return round_group


round_group, round_limited_group = _rounding(limited=False), _rounding(limited=True)
