"""Products of many rows with MXFP4 and bfloat16 matrices: a tile of a matrix is unpacked into cache, all rows meet it.

A tile is 32 outputs by 128 inputs in float32 (16 KB), a row of 32 outputs for each input. Vectors hold 16 outputs, so
that no sum across a vector is needed; up to 12 rows of inputs keep their sums in registers. A value of MXFP4 is looked
up by a permutation of a register. A result is the sum over the inputs in their order, whatever the number of rows. All
this is for AVX-512, which has 32 registers of 16 floats.

Rows belong to jobs: some of the rows that one matrix of a stack multiplies. The rows of a job are put into blocks of
equally many, in the order in which they are read: [depth, block, input, row]. Sums of a job with 32 outputs stay in
memory of the thread until all inputs are added; then the bias is added, and the sum rounded to bfloat16.

Measured, one thread (Emerald Rapids), a matrix of 5760 × 2880 in MXFP4: 9 rows 3.3 ms, 24 rows 5.7 ms, 256 rows 52 ms
(164 GFLOP/s); unpacked by `unpacking_loops` and multiplied by torch 6.1, 8.4 and 57 ms.

Reference: K. Goto and R. van de Geijn 2008, Anatomy of high-performance matrix multiplication, for the blocking.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.row_loops import _rounded_bits, _widened, bfloat16_at, set_float
from workbench.kernels.cpu.vectors import (
    GROUP,
    LANES,
    Value,
    _all_values,
    _broadcast,
    _f32,
    _floats,
    _function,
    _i8,
    _i32,
    _i64,
    _int,
    _ints,
    _load,
    _permutation,
    _pointer,
    _prefetch,
    _repeat,
    _transposed,
    _words,
    integer,
    take,
)

OUTPUTS, DEPTH = 2 * LANES, 128
LEAST_ROWS, MOST_ROWS = 4, 12  # of a block; with fewer, a sum would wait for its predecessor
JOB_ROWS = 512  # at most, in all blocks of a job
JOB_FIELDS = 6  # matrix; position of its first row, and how many rows; blocks, rows of each; rows of blocks before
_ROW_BYTES = 4 * OUTPUTS  # of a tile: the outputs of one input; and of sums: the outputs of one row
_LINE = 64  # bytes of the cache
_TILE_BYTES = _ROW_BYTES * DEPTH
THREAD_BYTES = _TILE_BYTES + _ROW_BYTES * JOB_ROWS


def _store_inputs(b: Any, values: list[Value], result: Value) -> None:
    """Write vectors of 16 outputs, one for each input in order, into neighbouring rows of a tile."""
    for position, value in enumerate(values):
        b.store(value, _pointer(b, value.type, result, _int(_ROW_BYTES * position)), align=64)


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


@intrinsic
def _unpack_group(typingctx, blocks, scales, groups, result):
    """Write a group of 16 outputs of an MXFP4 matrix into 32 rows of a tile."""

    def generate(context, b, signature, arguments):
        blocks, scales, groups, result = arguments
        quad = ir.VectorType(_i32, 4)
        rows = [_load(b, quad, blocks, b.mul(_int(LANES * output), groups)) for output in range(LANES)]
        factors = _scale_factors(b, scales, groups)
        permute = _permutation(b)
        values = [
            b.fmul(b.call(permute, [_all_values(), b.lshr(column, _repeat(_ints, 4 * nibble))]), factors)
            for column in _dwords_by_output(b, rows)
            for nibble in range(8)
        ]
        _store_inputs(b, values, result)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _widen_group(typingctx, matrix, width, result):
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


def _products(rows: int) -> Any:
    """Return an intrinsic: add to the sums of `rows` rows their products with a tile.

    Its arguments: the addresses of the tile, of a block of inputs [input, row] and of sums [row, 32], how many inputs,
    and 0 where the sums begin.
    """

    @intrinsic
    def products(typingctx, tile, inputs, sums, depth, continued):
        def generate(context, b, signature, arguments):
            tile, inputs, sums, depth, continued = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            at = [_pointer(b, _floats, sums, _int(4 * LANES * vector)) for vector in range(2 * rows)]
            totals = [cgutils.alloca_once_value(b, _repeat(_floats, 0.0)) for _ in at]
            for total in totals:
                b.store(_repeat(_floats, 0.0), total)
            with b.if_then(b.icmp_unsigned("!=", continued, _int(0))):
                for total, source in zip(totals, at, strict=True):
                    b.store(b.load(source, align=64), total)
            with cgutils.for_range(b, depth, intp=_i64) as loop:
                start = b.mul(loop.index, _int(_ROW_BYTES))
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

        return types.void(*[types.int64] * 5), generate

    return products


_by_4, _by_5, _by_6, _by_7, _by_8, _by_9, _by_10, _by_11, _by_12 = (
    _products(rows) for rows in range(LEAST_ROWS, MOST_ROWS + 1)
)

_inline = njit(nogil=True)


@intrinsic
def _store_rounded(typingctx, sums, bias, result):
    """Write 32 sums, plus a bias of bfloat16 if its address is not 0, as bfloat16."""

    def generate(context, b, signature, arguments):
        sums, bias, result = arguments
        for half in (0, 1):
            narrow = _int(2 * LANES * half)
            total = cgutils.alloca_once_value(b, _repeat(_floats, 0.0))
            b.store(b.load(_pointer(b, _floats, sums, _int(4 * LANES * half)), align=64), total)
            with b.if_then(b.icmp_unsigned("!=", bias, _int(0))):
                b.store(b.fadd(b.load(total), _widened(b, _load(b, _words, bias, narrow))), total)
            bits = b.lshr(_rounded_bits(b, b.load(total)), _repeat(_ints, 16))
            b.store(b.trunc(bits, _words), _pointer(b, _words, result, narrow), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@_inline
def _add_products(tile, inputs, sums, depth, blocks, rows, continued):
    """Add the products of all blocks of inputs with a tile; `rows` in each block."""
    for block in range(blocks):
        x, at = inputs + 4 * block * depth * rows, sums + block * rows * _ROW_BYTES
        if rows == 12:
            _by_12(tile, x, at, depth, continued)
        elif rows == 11:
            _by_11(tile, x, at, depth, continued)
        elif rows == 10:
            _by_10(tile, x, at, depth, continued)
        elif rows == 9:
            _by_9(tile, x, at, depth, continued)
        elif rows == 8:
            _by_8(tile, x, at, depth, continued)
        elif rows == 7:
            _by_7(tile, x, at, depth, continued)
        elif rows == 6:
            _by_6(tile, x, at, depth, continued)
        elif rows == 5:
            _by_5(tile, x, at, depth, continued)
        else:
            _by_4(tile, x, at, depth, continued)


@intrinsic
def _ask_for(typingctx, address):
    """Ask for a line of memory to be in the cache."""

    def generate(context, b, signature, arguments):
        _prefetch(b, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_inline
def _ask_for_rows(address, stride, size):
    """Ask for `size` bytes of each of the 32 rows of the next tile, `stride` bytes apart.

    The processor does not foresee reads of a few bytes in each of many rows. Rows begin anywhere in a line.
    """
    for row in range(OUTPUTS):
        at = address + row * stride
        for byte in range(0, size, _LINE):
            _ask_for(at + byte)
        _ask_for(at + size - 1)


@_inline
def _field(jobs, job, field):
    """Return a number of a job, in the order of `JOB_FIELDS`."""
    return integer(jobs + 8 * (JOB_FIELDS * job + field))


@_inline
def _row(order, position):
    """Return the row of the results at a position: they are in their order where `order` is 0."""
    return integer(order + 8 * position) if order else position


@_inline
def _store_results(sums, jobs, job, order, bias, outputs, output, results):
    """Write the sums of a job with 32 outputs into its rows of the results [..., outputs]."""
    matrix, first, count = _field(jobs, job, 0), _field(jobs, job, 1), _field(jobs, job, 2)
    at = bias + 2 * (matrix * outputs + output) if bias else 0
    for i in range(count):
        row = _row(order, first + i)
        _store_rounded(sums + i * _ROW_BYTES, at, results + 2 * (row * outputs + output))


def _arrange(counter, jobs, number, most, order, shared, source, width, inputs):
    """Put the bfloat16 rows [..., width] of jobs into blocks of float32 rows; the last row again where one is missing.

    number: of the jobs, with at most `most` blocks each. shared: rows of results that have one row of inputs.
    """
    while True:
        item = take(counter, 1)
        if item >= number * most:
            return
        job, block = item // most, item % most
        first, count = _field(jobs, job, 1), _field(jobs, job, 2)
        blocks, rows = _field(jobs, job, 3), _field(jobs, job, 4)
        if block >= blocks:
            continue
        before = inputs + 4 * _field(jobs, job, 5) * width
        for start in range(0, width, DEPTH):
            depth = min(DEPTH, width - start)
            target = before + 4 * (start * blocks * rows + block * depth * rows)
            for row in range(rows):
                position = first + min(block * rows + row, count - 1)
                at = source + 2 * (_row(order, position) // shared * width + start)
                for i in range(depth):
                    set_float(target + 4 * (i * rows + row), bfloat16_at(at + 2 * i))


def _multiply_packed(
    counter, memory, jobs, number, order, packed, scales, groups, outputs, inputs, bias, results
):  # fmt: skip
    """Multiply the arranged inputs of jobs by their MXFP4 matrices [outputs, groups].

    memory: of the threads, after a counter that shares it out. results: bfloat16 [..., outputs].
    """
    tile = memory + 64 + THREAD_BYTES * take(memory, 1)
    sums, tiles = tile + _TILE_BYTES, outputs // OUTPUTS
    while True:
        item = take(counter, 1)
        if item >= number * tiles:
            return
        job, output = item // tiles, item % tiles * OUTPUTS
        blocks, rows = _field(jobs, job, 3), _field(jobs, job, 4)
        x = inputs + 4 * _field(jobs, job, 5) * GROUP * groups
        base = _field(jobs, job, 0) * outputs + output
        for start in range(0, groups, DEPTH // GROUP):
            depth = min(DEPTH // GROUP, groups - start)
            if start + depth < groups:
                _ask_for_rows(packed + 16 * (base * groups + start + depth), 16 * groups, DEPTH // 2)
            else:
                _ask_for_rows(packed + 16 * (base + OUTPUTS) * groups, 16 * groups, DEPTH // 2)
                _ask_for_rows(scales + (base + OUTPUTS) * groups, groups, groups)
            for group in range(depth):
                for vector in range(OUTPUTS // LANES):
                    at = (base + LANES * vector) * groups + start + group
                    _unpack_group(
                        packed + 16 * at, scales + at, groups, tile + GROUP * _ROW_BYTES * group + 64 * vector
                    )
            _add_products(tile, x + 4 * GROUP * start * blocks * rows, sums, GROUP * depth, blocks, rows, start)
        _store_results(sums, jobs, job, order, bias, outputs, output, results)


def _multiply_dense(counter, memory, jobs, number, matrix, width, outputs, inputs, bias, results):
    """Multiply the arranged inputs of jobs by a bfloat16 matrix [outputs, width]; otherwise as `_multiply_packed`."""
    tile = memory + 64 + THREAD_BYTES * take(memory, 1)
    sums, tiles = tile + _TILE_BYTES, outputs // OUTPUTS
    while True:
        item = take(counter, 1)
        if item >= number * tiles:
            return
        job, output = item // tiles, item % tiles * OUTPUTS
        blocks, rows = _field(jobs, job, 3), _field(jobs, job, 4)
        x = inputs + 4 * _field(jobs, job, 5) * width
        for start in range(0, width, DEPTH):
            depth = min(DEPTH, width - start)
            if start + depth < width:
                _ask_for_rows(matrix + 2 * (output * width + start + depth), 2 * width, 2 * DEPTH)
            else:
                _ask_for_rows(matrix + 2 * (output + OUTPUTS) * width, 2 * width, 2 * DEPTH)
            for first in range(0, depth, GROUP):
                for vector in range(OUTPUTS // LANES):
                    at = matrix + 2 * ((output + LANES * vector) * width + start + first)
                    _widen_group(at, width, tile + _ROW_BYTES * first + 64 * vector)
            _add_products(tile, x + 4 * start * blocks * rows, sums, depth, blocks, rows, start)
        _store_results(sums, jobs, job, 0, bias, outputs, output, results)


class TileLoops(NamedTuple):
    """The compiled loops of this module."""

    arrange: Callable[..., None]
    multiply_packed: Callable[..., None]
    multiply_dense: Callable[..., None]


def compile_all() -> TileLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    return TileLoops(
        compile_loop(_arrange, *[types.int64] * 9),
        compile_loop(_multiply_packed, *[types.int64] * 12),
        compile_loop(_multiply_dense, *[types.int64] * 10),
    )
