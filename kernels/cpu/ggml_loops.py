"""Compiled loops over ggml's blocks: MXFP4 into bytes in the published order and scales, and Q8_0 into bfloat16.

numpy's vector operations reorder 0.3 GB a second and a thread, so that gpt-oss-20b would take half a minute. Here 16
bytes are one vector, and blocks and scales are read together. numba compiles it, as `workbench.kernels.cpu` explains;
where that is not available, `workbench.kernels.ggml` computes the same.

Cost for each group of 32 values: MXFP4 17 bytes read and written, Q8_0 34 bytes read and 64 written.
"""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop

_i8 = ir.IntType(8)
_half, _bytes = ir.VectorType(_i8, 8), ir.VectorType(_i8, 16)
_ints, _floats = ir.VectorType(ir.IntType(32), 32), ir.VectorType(ir.FloatType(), 32)


def _lanes(*numbers: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), numbers)


def _repeat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _published(b: Any, packed: Any) -> Any:
    """Return 16 bytes in the published order: byte i holds values 2i and 2i + 1, of the low nibbles before the high."""
    none = ir.Constant(_bytes, ir.Undefined)
    even, odd = (b.shuffle_vector(packed, none, _lanes(*range(start, 16, 2))) for start in (0, 1))
    low = b.or_(b.and_(even, _repeat(_half, 0x0F)), b.shl(odd, _repeat(_half, 4)))
    high = b.or_(b.lshr(even, _repeat(_half, 4)), b.and_(odd, _repeat(_half, 0xF0)))
    return b.shuffle_vector(low, high, _lanes(*range(16)))


@intrinsic
def _separate(typingctx, source, block, scale, reorder):
    """Write the 16 bytes and the scale of one block. All arguments but the last are addresses."""

    def generate(context, b, signature, arguments):
        source, block, scale, reorder = arguments
        exponent = b.load(b.inttoptr(source, ir.PointerType(_i8)))
        after = b.add(source, ir.Constant(ir.IntType(64), 1))
        packed = b.load(b.inttoptr(after, ir.PointerType(_bytes)), align=1)
        packed = b.select(reorder, _published(b, packed), packed)
        b.store(exponent, b.inttoptr(scale, ir.PointerType(_i8)))
        b.store(packed, b.inttoptr(block, ir.PointerType(_bytes)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.boolean), generate


def _separate_rows(source, rows, groups, blocks, scales, stride, reorder):
    """Separate rows of `groups` blocks; row i is written to row `stride` · i of the results. Addresses are integers."""
    for row in range(rows):
        first = source + row * groups * 17
        at = stride * row * groups
        for group in range(groups):
            _separate(first + 17 * group, blocks + 16 * (at + group), scales + at + group, reorder)


@intrinsic
def _widen(typingctx, source, result):
    """Write the 32 values of a block of Q8_0 (a float16 scale, signed bytes) as bfloat16, ties rounded to even."""

    def generate(context, b, signature, arguments):
        source, result = arguments
        scale = b.load(b.inttoptr(source, ir.PointerType(ir.HalfType())), align=1)
        after = b.add(source, ir.Constant(ir.IntType(64), 2))
        codes = b.load(b.inttoptr(after, ir.PointerType(ir.VectorType(_i8, 32))), align=1)
        empty = ir.Constant(_floats, ir.Undefined)
        first = b.insert_element(empty, b.fpext(scale, ir.FloatType()), ir.Constant(ir.IntType(32), 0))
        values = b.fmul(b.sitofp(codes, _floats), b.shuffle_vector(first, empty, _lanes(*[0] * 32)))  # exact
        bits = b.bitcast(values, _ints)
        even = b.and_(b.lshr(bits, _repeat(_ints, 16)), _repeat(_ints, 1))
        rounded = b.lshr(b.add(b.add(bits, _repeat(_ints, 0x7FFF)), even), _repeat(_ints, 16))
        rounded = b.select(b.fcmp_unordered("uno", values, values), _repeat(_ints, 0x7FC0), rounded)
        words = b.trunc(rounded, ir.VectorType(ir.IntType(16), 32))
        b.store(words, b.inttoptr(result, ir.PointerType(words.type)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _widen_blocks(source, blocks, result):
    """Write blocks of Q8_0 that follow each other as bfloat16."""
    for block in range(blocks):
        _widen(source + 34 * block, result + 64 * block)


@functools.cache
def separate_rows() -> Callable[..., None]:
    """Return the compiled loop over MXFP4."""
    return compile_loop(_separate_rows, *[types.int64] * 6, types.boolean)


@functools.cache
def widen_blocks() -> Callable[..., None]:
    """Return the compiled loop over Q8_0."""
    return compile_loop(_widen_blocks, *[types.int64] * 3)
