"""Operations on rows of float32 in vectors of 16: what lies between the products of a layer.

A value that the reference rounds to bfloat16 is rounded here too, and stays in float32, which holds it exactly. Rows
are addresses, and sizes are numbers of vectors. Exponentials are a polynomial of degree 7 (relative error 2e-7).

Reference: S. Moshier, Cephes Mathematical Library 2.8, `expf`, for the polynomial.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.vectors import (
    LANES,
    Value,
    _broadcast,
    _f32,
    _floats,
    _function,
    _i16,
    _i32,
    _i64,
    _int,
    _ints,
    _load,
    _pointer,
    _repeat,
    _target,
    _words,
)

Builder = Any
_VECTOR = 4 * LANES  # bytes
_EXP = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0
)  # fmt: skip
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_NEAREST = 12582912.0  # 1.5 · 2^23: a float32 that is added to it keeps its nearest integer in the lowest bits
_LEAST, _MOST = -86.0, 88.0  # exponents whose exponential is a normal float32


def _constant(kind: Any, value: float) -> Value:
    return _repeat(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def _like(value: Value, bits: int) -> Any:
    """Return integers of this many bits, as many as `value` has lanes."""
    integers = ir.IntType(bits)
    return ir.VectorType(integers, LANES) if isinstance(value.type, ir.VectorType) else integers


def _widened(b: Builder, bits: Value) -> Value:
    """Return bfloat16 as float32."""
    ints = _like(bits, 32)
    floats = _floats if isinstance(ints, ir.VectorType) else _f32
    return b.bitcast(b.shl(b.zext(bits, ints), _constant(ints, 16)), floats)


def _rounded_bits(b: Builder, value: Value) -> Value:
    """Return the bits of the nearest bfloat16 (ties to even) in the upper half of an integer; the lower is zero."""
    ints = _like(value, 32)
    bits = b.bitcast(value, ints)
    even = b.and_(b.lshr(bits, _constant(ints, 16)), _constant(ints, 1))
    nearest = b.and_(b.add(b.add(bits, _constant(ints, 0x7FFF)), even), _constant(ints, 0xFFFF0000))
    return b.select(b.fcmp_unordered("uno", value, value), _constant(ints, 0x7FC00000), nearest)


def _rounded(b: Builder, value: Value) -> Value:
    return b.bitcast(_rounded_bits(b, value), value.type)


def _store_bfloat16(b: Builder, value: Value, *address: Value) -> None:
    """Write 16 floats, rounded to bfloat16, at an address and offsets in bytes."""
    bits = b.lshr(_rounded_bits(b, value), _repeat(_ints, 16))
    b.store(b.trunc(bits, _words), _pointer(b, _words, *address), align=1)


def _exponential(b: Builder, x: Value) -> Value:
    """Return e^x, of x between `_LEAST` and `_MOST`; NaN stays NaN."""
    multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
    least, most = _repeat(_floats, _LEAST), _repeat(_floats, _MOST)
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    x = b.select(b.fcmp_ordered(">", x, most), most, x)
    shifted = b.call(multiply_add, [x, _repeat(_floats, _LOG2_E), _repeat(_floats, _NEAREST)])
    integer = b.fsub(shifted, _repeat(_floats, _NEAREST))
    rest = b.call(multiply_add, [integer, _repeat(_floats, -_LN2_HIGH), x])
    rest = b.call(multiply_add, [integer, _repeat(_floats, -_LN2_LOW), rest])
    total = _repeat(_floats, _EXP[0])
    for coefficient in _EXP[1:]:
        total = b.call(multiply_add, [total, rest, _repeat(_floats, coefficient)])
    power = b.shl(b.bitcast(shifted, _ints), _repeat(_ints, 23))  # 2^whole, as an addend of the exponent
    return b.bitcast(b.add(b.bitcast(total, _ints), power), _floats)


def _sum(b: Builder, vector: Value) -> Value:
    add_up = _function(b, "llvm.vector.reduce.fadd.v16f32", _f32, _f32, _floats)
    return b.call(add_up, [ir.Constant(_f32, 0.0), vector], fastmath=("reassoc",))


def _store(b: Builder, value: Value, address: Value, *offsets: Value) -> None:
    b.store(value, _pointer(b, value.type, address, *offsets), align=1)


def _elementwise(sources: str, compute: Callable[..., Value]) -> Any:
    """Return an intrinsic that writes float32 vectors: `compute` of the builder, a vector of each source, and a number.

    sources: a letter each, f for float32 and b for bfloat16. Its arguments: the sources' addresses, the number
    (float32, 0 where it is not used), the number of vectors, and the address of the result, also that of a source.
    """

    @intrinsic
    def operation(typingctx, inputs, number, vectors, result):
        pointers = types.UniTuple(types.int64, len(sources))
        signature = types.void(pointers, types.float32, types.int64, types.int64)

        def generate(context, b, signature, arguments):
            inputs, number = cgutils.unpack_tuple(b, arguments[0]), _broadcast(b, arguments[1])
            with cgutils.for_range(b, arguments[2], intp=_i64) as loop:
                wide, narrow = (b.mul(loop.index, _int(size)) for size in (_VECTOR, _VECTOR // 2))
                values = [
                    _load(b, _floats, at, wide) if kind == "f" else _widened(b, _load(b, _words, at, narrow))
                    for kind, at in zip(sources, inputs, strict=True)
                ]
                _store(b, compute(b, *values, number), arguments[3], wide)
            return context.get_dummy_value()

        return signature, generate

    return operation


add_bias = _elementwise("fb", lambda b, x, bias, _: _rounded(b, b.fadd(x, bias)))
add = _elementwise("ff", lambda b, x, y, _: _rounded(b, b.fadd(x, y)))
normalize = _elementwise("fb", lambda b, x, weight, scale: _rounded(b, b.fmul(b.fdiv(x, scale), weight)))
fill = _elementwise("f", lambda b, x, number: number)
round_row = _elementwise("f", lambda b, x, _: _rounded(b, x))
multiply = _elementwise("f", lambda b, x, factor: b.fmul(x, factor))
multiply_rounded = _elementwise("f", lambda b, x, factor: _rounded(b, b.fmul(x, factor)))
divide_rounded = _elementwise("f", lambda b, x, divisor: _rounded(b, b.fdiv(x, divisor)))
add_weighted = _elementwise("ff", lambda b, total, x, weight: b.fadd(total, b.fmul(x, weight)))


@intrinsic
def sum_of_squares(typingctx, row, vectors):
    """Return the sum of the squares of a row."""

    def generate(context, b, signature, arguments):
        multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
        total = cgutils.alloca_once_value(b, _repeat(_floats, 0.0))
        with cgutils.for_range(b, arguments[1], intp=_i64) as loop:
            x = _load(b, _floats, arguments[0], b.mul(loop.index, _int(_VECTOR)))
            b.store(b.call(multiply_add, [x, x, b.load(total)]), total)
        return _sum(b, b.load(total))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def largest(typingctx, row, vectors):
    """Return the largest value of a row; NaN is passed over."""

    def generate(context, b, signature, arguments):
        top = cgutils.alloca_once_value(b, _repeat(_floats, float("-inf")))
        with cgutils.for_range(b, arguments[1], intp=_i64) as loop:
            x = _load(b, _floats, arguments[0], b.mul(loop.index, _int(_VECTOR)))
            b.store(b.select(b.fcmp_ordered(">", x, b.load(top)), x, b.load(top)), top)
        return b.call(_function(b, "llvm.vector.reduce.fmax.v16f32", _f32, _floats), [b.load(top)])

    return types.float32(types.int64, types.int64), generate


@intrinsic
def exponentials(typingctx, row, vectors, top):
    """Replace a row by e^(x − top), and return the sum."""

    def generate(context, b, signature, arguments):
        total, top = cgutils.alloca_once_value(b, _repeat(_floats, 0.0)), _broadcast(b, arguments[2])
        with cgutils.for_range(b, arguments[1], intp=_i64) as loop:
            at = b.mul(loop.index, _int(_VECTOR))
            power = _exponential(b, b.fsub(_load(b, _floats, arguments[0], at), top))
            _store(b, power, arguments[0], at)
            b.store(b.fadd(b.load(total), power), total)
        return _sum(b, b.load(total))

    return types.float32(types.int64, types.int64, types.float32), generate


def _swiglu(b: Builder, gate: Value, up: Value, limit: Value, alpha: Value) -> Value:
    """Return gate · sigmoid(alpha · gate) · (up + 1): gate clamped from above, up on both sides; NaN stays NaN."""
    one, lower = _repeat(_floats, 1.0), b.fneg(limit)
    gate = b.select(b.fcmp_ordered(">", gate, limit), limit, gate)
    up = b.select(b.fcmp_ordered(">", up, limit), limit, up)
    up = b.select(b.fcmp_ordered("<", up, lower), lower, up)
    sigmoid = b.fdiv(one, b.fadd(one, _exponential(b, b.fneg(b.fmul(alpha, gate)))))
    return b.fmul(b.fmul(gate, sigmoid), b.fadd(up, one))


@intrinsic
def swiglu_group(typingctx, source, limit, alpha, result):
    """Write 32 activations from 32 neighbouring pairs of gate and up, rounded, the even positions before the odd."""

    def generate(context, b, signature, arguments):
        source, limit, alpha, result = arguments
        limit, alpha = _broadcast(b, limit), _broadcast(b, alpha)

        def lanes(start: int, step: int) -> Value:
            return ir.Constant(_ints, list(range(start, start + step * LANES, step)))

        posts = []
        for half in (0, 2 * _VECTOR):
            pairs = [_load(b, _floats, source, _int(half + at)) for at in (0, _VECTOR)]
            gate, up = (b.shuffle_vector(*pairs, lanes(start, 2)) for start in (0, 1))
            posts.append(_rounded(b, _swiglu(b, gate, up, limit, alpha)))
        for start in (0, 1):
            _store(b, b.shuffle_vector(*posts, lanes(start, 2)), result, _int(start * _VECTOR))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64), generate


@intrinsic
def separate_group(typingctx, source, result):
    """Write 32 values with the even positions before the odd ones, as products with MXFP4 read them."""

    def generate(context, b, signature, arguments):
        halves = [_load(b, _floats, arguments[0], _int(at)) for at in (0, _VECTOR)]
        for half in (0, 1):
            lanes = ir.Constant(_ints, list(range(half, 2 * LANES, 2)))
            _store(b, b.shuffle_vector(*halves, lanes), arguments[1], _int(half * _VECTOR))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _dots(heads: int) -> Any:
    """Return an intrinsic: scaled inner products of `heads` float32 rows with one bfloat16 row.

    Its arguments: the address of the first row and of the bfloat16 row, the number of vectors in each, the address of
    the first result, bytes from one result to the next, and the scale.
    """

    @intrinsic
    def dots(typingctx, rows, key, vectors, result, stride, scale):
        def generate(context, b, signature, arguments):
            rows, key, vectors, result, stride, scale = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            width = b.mul(vectors, _int(_VECTOR))
            sums = [cgutils.alloca_once_value(b, _repeat(_floats, 0.0)) for _ in range(heads)]
            with cgutils.for_range(b, vectors, intp=_i64) as loop:
                values = _widened(b, _load(b, _words, key, b.mul(loop.index, _int(_VECTOR // 2))))
                for head, total in enumerate(sums):
                    row = _load(b, _floats, rows, b.mul(width, _int(head)), b.mul(loop.index, _int(_VECTOR)))
                    b.store(b.call(multiply_add, [row, values, b.load(total)]), total)
            for head, total in enumerate(sums):
                _store(b, b.fmul(_sum(b, b.load(total)), scale), result, b.mul(stride, _int(head)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32), generate

    return dots


def _weighted_sums(heads: int) -> Any:
    """Return an intrinsic: add to a vector of each of `heads` rows the weighted vectors of bfloat16 rows.

    Its arguments: the address of the first head's weights and bytes to the next head's, the address of the vector in
    the first bfloat16 row and bytes to the next row, the number of rows, the address of the vector in the first sum,
    and bytes to the next head's.
    """

    @intrinsic
    def weighted_sums(typingctx, weights, weight_stride, values, value_stride, n, sums, sum_stride):
        def generate(context, b, signature, arguments):
            weights, weight_stride, values, value_stride, n, sums, sum_stride = arguments
            multiply_add = _function(b, "llvm.fma.v16f32", _floats, _floats, _floats, _floats)
            begins = [_load(b, _floats, sums, b.mul(sum_stride, _int(head))) for head in range(heads)]
            totals = [cgutils.alloca_once_value(b, begin) for begin in begins]
            with cgutils.for_range(b, n, intp=_i64) as loop:
                value = _widened(b, _load(b, _words, values, b.mul(loop.index, value_stride)))
                for head, total in enumerate(totals):
                    at = b.add(b.mul(weight_stride, _int(head)), b.mul(loop.index, _int(4)))
                    weight = _broadcast(b, _load(b, _f32, weights, at))
                    b.store(b.call(multiply_add, [weight, value, b.load(total)]), total)
            for head, total in enumerate(totals):
                _store(b, b.load(total), sums, b.mul(sum_stride, _int(head)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return weighted_sums


TILE = 4  # heads that read a key or a value together
dots_by_one, dots_by_four = _dots(1), _dots(TILE)
weighted_sums_by_one, weighted_sums_by_four = _weighted_sums(1), _weighted_sums(TILE)


@intrinsic
def float_at(typingctx, address):
    """Load a float32."""
    return types.float32(types.int64), lambda context, b, signature, arguments: _load(b, _f32, arguments[0])


@intrinsic
def bfloat16_at(typingctx, address):
    """Load a bfloat16 as float32."""
    return types.float32(types.int64), lambda context, b, signature, arguments: _widened(b, _load(b, _i16, *arguments))


@intrinsic
def rounded(typingctx, value):
    """Round to bfloat16."""
    return types.float32(types.float32), lambda context, b, signature, arguments: _rounded(b, arguments[0])


def _writer(kind: Any, convert: Callable[[Builder, Value], Value]) -> Any:
    @intrinsic
    def write(typingctx, address, value):
        def generate(context, b, signature, arguments):
            _store(b, convert(b, arguments[1]), arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64, kind), generate

    return write


set_float = _writer(types.float32, lambda b, value: value)
set_integer = _writer(types.int64, lambda b, value: value)
set_bfloat16 = _writer(
    types.float32, lambda b, value: b.trunc(b.lshr(_rounded_bits(b, value), ir.Constant(_i32, 16)), _i16)
)


_SPINS = 1000  # until a waiting thread lets others have its core: about 10 microseconds


@intrinsic
def wait_for(typingctx, address, count):
    """Wait until a counter that threads share has reached `count`, and see what they wrote before they counted."""

    def generate(context, b, signature, arguments):
        address, count = arguments
        counter, triple = _pointer(b, _i64, address), _target(context)[0]
        spins = cgutils.alloca_once_value(b, _int(0))
        check, waiting, reached = (b.append_basic_block(name) for name in ("check", "waiting", "reached"))
        b.branch(check)
        b.position_at_end(check)
        b.cbranch(b.icmp_signed("<", b.load_atomic(counter, "acquire", 8), count), waiting, reached)
        b.position_at_end(waiting)
        b.store(b.add(b.load(spins), _int(1)), spins)
        if triple.startswith(("x86_64", "i686")):
            b.call(_function(b, "llvm.x86.sse2.pause", ir.VoidType()), [])
        if "windows" not in triple:
            with b.if_then(b.icmp_signed(">", b.load(spins), _int(_SPINS)), likely=False):
                b.call(_function(b, "sched_yield", _i32), [])
        b.branch(check)
        b.position_at_end(reached)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
