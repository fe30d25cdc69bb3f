"""Jobs of products by tiles: some of the rows that one matrix of a stack multiplies, and what becomes of their sums.

A tile is 32 outputs of a matrix by some of its inputs, in the cache of a thread, and all rows of a job meet it. The
rows of a job are put into blocks of equally many, in the order in which they are read. Vectors hold 16 outputs, so that
no sum across a vector is needed; up to 12 rows of a block keep their sums in registers. Sums of a job with 32 outputs
stay in memory of the thread until all inputs are added; then the bias is added, and the sum rounded to bfloat16. All
this is for AVX-512, which has 32 registers of 16 numbers.

Reference: K. Goto and R. van de Geijn 2008, Anatomy of high-performance matrix multiplication, for the blocking.
"""

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.row_loops import _store_bfloat16, _widened
from workbench.kernels.cpu.vectors import (
    LANES,
    _floats,
    _i64,
    _int,
    _load,
    _pointer,
    _prefetch,
    _repeat,
    _words,
    integer,
)

OUTPUTS = 2 * LANES
ROW_BYTES = 4 * OUTPUTS  # of a tile: the outputs of one input or pair of inputs; and of sums: the outputs of one row
LEAST_ROWS, MOST_ROWS = 4, 12  # of a block; with fewer, a sum would wait for its predecessor
JOB_ROWS = 1024 + MOST_ROWS  # at most, in all blocks of a job, which may have rows to spare
JOB_FIELDS = 6  # matrix; position of its first row, and how many rows; blocks, rows of each; rows of blocks before
_LINE = 64  # bytes of the cache

inline = njit(nogil=True)


@intrinsic
def clear(typingctx, sums, rows):
    """Write zeros into the sums of rows."""

    def generate(context, b, signature, arguments):
        sums, rows = arguments
        with cgutils.for_range(b, rows, intp=_i64) as loop:
            for half in (0, 64):
                at = _pointer(b, _floats, sums, b.mul(loop.index, _int(ROW_BYTES)), _int(half))
                b.store(_repeat(_floats, 0.0), at, align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def block_products(products: Callable[[int], Any], numbers: int) -> Any:
    """Return a function of loops: add products of all blocks of inputs with `count` tiles to sums [tile, row, 32].

    products: returns the intrinsic for a number of rows; its arguments are the addresses of a tile, of a block of
    inputs and of its sums, and the depth of the tile. numbers: of 32 bits, that a row of inputs has for each of depth.
    """
    by_4, by_5, by_6, by_7, by_8, by_9, by_10, by_11, by_12 = map(products, range(LEAST_ROWS, MOST_ROWS + 1))

    @inline
    def add_products(tiles, inputs, sums, depth, blocks, rows, count, tile_bytes):
        for block in range(blocks):
            x = inputs + 4 * numbers * block * depth * rows
            for n in range(count):
                tile, at = tiles + n * tile_bytes, sums + (n * blocks + block) * rows * ROW_BYTES
                if rows == 12:
                    by_12(tile, x, at, depth)
                elif rows == 11:
                    by_11(tile, x, at, depth)
                elif rows == 10:
                    by_10(tile, x, at, depth)
                elif rows == 9:
                    by_9(tile, x, at, depth)
                elif rows == 8:
                    by_8(tile, x, at, depth)
                elif rows == 7:
                    by_7(tile, x, at, depth)
                elif rows == 6:
                    by_6(tile, x, at, depth)
                elif rows == 5:
                    by_5(tile, x, at, depth)
                else:
                    by_4(tile, x, at, depth)

    return add_products


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
            _store_bfloat16(b, b.load(total), result, narrow)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def _ask_for(typingctx, address):
    """Ask for a line of memory to be in the cache."""

    def generate(context, b, signature, arguments):
        _prefetch(b, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inline
def ask_for_rows(address, stride, size):
    """Ask for `size` bytes of each of the 32 rows of the next tile, `stride` bytes apart.

    The processor does not foresee reads of a few bytes in each of many rows. Rows begin anywhere in a line.
    """
    for row in range(OUTPUTS):
        at = address + row * stride
        for byte in range(0, size, _LINE):
            _ask_for(at + byte)
        _ask_for(at + size - 1)


@inline
def field(jobs, job, number):
    """Return a number of a job, in the order of `JOB_FIELDS`."""
    return integer(jobs + 8 * (JOB_FIELDS * job + number))


@inline
def row_at(rows, position):
    """Return the row that a position stands for: of a list at this address, or itself where there is none."""
    return integer(rows + 8 * position) if rows else position


@inline
def store_results(sums, jobs, job, targets, bias, outputs, output, results):
    """Write the sums of a job with 32 outputs into its rows of the results [..., outputs]."""
    matrix, first, count = field(jobs, job, 0), field(jobs, job, 1), field(jobs, job, 2)
    at = bias + 2 * (matrix * outputs + output) if bias else 0
    for i in range(count):
        row = row_at(targets, first + i)
        _store_rounded(sums + i * ROW_BYTES, at, results + 2 * (row * outputs + output))
