"""LLVM vectors of 16 values in numba's loops: loads, the values of MXFP4, and which instructions a processor has.

numba compiles the loops; their innermost part is written as LLVM vectors of 16 floats, which become AVX-512, AVX2 or
NEON instructions. With AVX-512 a value of MXFP4 is looked up by a permutation of a register that holds all 16 values
times the scale. Elsewhere its bits are put where float16 has its sign, its two lowest exponent bits and its highest
mantissa bit, and the processor's conversion to float32 does the rest. Both are exact.

All arguments of loops are integers: addresses, and sizes in elements.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
GROUP = 32  # values of MXFP4 with one scale: 16 bytes with two values each
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HALF_TO_E2M1 = 2.0**14  # from float16's exponent bias of 15 to e2m1's of 1

_i8, _i16, _i32, _i64, _f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_bytes, _words, _ints = (ir.VectorType(t, LANES) for t in (_i8, _i16, _i32))
_floats = ir.VectorType(_f32, LANES)

Builder = Any
Value = Any


def _int(value: int) -> Value:
    return ir.Constant(_i64, value)


def _repeat(kind: ir.VectorType, value: float) -> Value:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * LANES)


def _broadcast(b: Builder, scalar: Value) -> Value:
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, scalar, ir.Constant(_i32, 0)), empty, _repeat(_ints, 0))


def _load(b: Builder, kind: Any, address: Value, *offsets: Value) -> Value:
    """Load from an address and offsets in bytes. Mapped files give no alignment, so that none is assumed."""
    return b.load(_pointer(b, kind, address, *offsets), align=1)


def _pointer(b: Builder, kind: Any, address: Value, *offsets: Value) -> Value:
    for offset in offsets:
        address = b.add(address, offset)
    return b.inttoptr(address, ir.PointerType(kind))


def _prefetch(b: Builder, address: Value, *offsets: Value) -> None:
    """Ask for a line of memory to be in the cache; addresses that are not mapped are ignored."""
    prefetch = _function(b, "llvm.prefetch.p0i8", ir.VoidType(), ir.PointerType(_i8), _i32, _i32, _i32)
    b.call(prefetch, [_pointer(b, _i8, address, *offsets), *(ir.Constant(_i32, n) for n in (0, 3, 1))])


def _function(b: Builder, name: str, returns: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, arguments), name)


def _permuted(b: Builder, packed: Value, scale: Value) -> tuple[Value, Value]:
    """Return the values in the low and in the high halves of 16 bytes, times the scale, by AVX-512's permutation."""
    return _permute(b, packed, b.fmul(_all_values(), _broadcast(b, scale)))


def _all_values() -> Value:
    return ir.Constant(_floats, [ir.Constant(_f32, sign * value) for sign in (1, -1) for value in E2M1])


def _permutation(b: Builder) -> Any:
    """Return AVX-512's lookup in a vector of 16 floats, which reads four bits of an index."""
    return _function(b, "llvm.x86.avx512.permvar.sf.512", _floats, _floats, _ints)


def _permute(b: Builder, packed: Value, table: Value) -> tuple[Value, Value]:
    permute = _permutation(b)
    index = b.zext(packed, _ints)
    return b.call(permute, [table, index]), b.call(permute, [table, b.lshr(index, _repeat(_ints, 4))])


def _converted(b: Builder, packed: Value, scale: Value) -> tuple[Value, Value]:
    """Return the same as `_permuted` by conversion from float16, on any processor that has it."""
    return _convert(b, packed, _broadcast(b, scale))


def _convert(b: Builder, packed: Value, factor: Value) -> tuple[Value, Value]:
    wide = b.zext(packed, _words)

    def values(sign_shift: int, magnitude_shift: int) -> Value:
        sign = b.and_(b.shl(wide, _repeat(_words, sign_shift)), _repeat(_words, 0x8000))
        magnitude = b.and_(b.shl(wide, _repeat(_words, magnitude_shift)), _repeat(_words, 0x0E00))
        half = b.bitcast(b.or_(sign, magnitude), ir.VectorType(ir.HalfType(), LANES))
        # Two products: 2^14 times the largest scales is infinite.
        return b.fmul(b.fmul(b.fpext(half, _floats), _repeat(_floats, _HALF_TO_E2M1)), factor)

    return values(12, 9), values(8, 5)


def _target(context: Any) -> tuple[str, list[str]]:
    """Return the triple and the features of the target processor; both are in the key of numba's cache."""
    triple, _, features = context.codegen().magic_tuple()
    return triple, features.split(",")


def _wide_registers(context: Any) -> bool:
    return "+avx512f" in _target(context)[1]


def instructions() -> str | None:
    """Return the name of the instruction set that the loops use on this processor, or None if it has none of them."""
    triple, features = _target(cpu_target.target_context)
    if triple.startswith(("aarch64", "arm64")):
        return "NEON"
    if "+avx512f" in features:
        return "AVX-512"
    return "AVX2" if {"+avx2", "+fma", "+f16c"} <= set(features) else None


def _processor() -> tuple[str, str, str]:
    """Return the triple, the name and the features of the processor that numba compiles for."""
    return cpu_target.target_context.codegen().magic_tuple()


def multiplies_words() -> bool:
    """Return whether this processor multiplies vectors of 32 integers of 16 bits: with AVX-512's part BW."""
    return "+avx512bw" in _processor()[2].split(",")


def adds_products_of_words() -> bool:
    """Return whether one instruction of this processor multiplies such vectors and adds the products: AVX-512 VNNI."""
    return "+avx512vnni" in _processor()[2].split(",")


def multiplies_bfloat16() -> bool:
    """Return whether this processor multiplies matrices of bfloat16 faster than matrices of float32.

    It does with AMX, with AVX-512 of AMD and with arm64's own instructions, where torch uses these. The AVX-512
    instructions of Intel for bfloat16 are slower than those for float32, and other processors have none.
    """
    triple, processor, features = _processor()
    instructions = set(features.split(","))
    if triple.startswith(("aarch64", "arm64")):
        return "+bf16" in instructions and "darwin" not in triple and "apple" not in triple
    return "+amx-bf16" in instructions or ("+avx512bf16" in instructions and processor.startswith("znver"))


def _transposed(b: Builder, rows: list[Value]) -> list[Value]:
    """Return the columns of n rows of n values: rows n / 2 apart are interleaved, log2(n) times."""
    n = len(rows)
    kind = ir.VectorType(_i32, n)
    orders = [ir.Constant(kind, [start + m // 2 + n * (m % 2) for m in range(n)]) for start in (0, n // 2)]
    for _ in range(n.bit_length() - 1):
        rows = [b.shuffle_vector(rows[m // 2], rows[m // 2 + n // 2], orders[m % 2]) for m in range(n)]
    return rows


@intrinsic
def take(typingctx, address, amount):
    """Add to a 64-bit counter that threads share and return its value before."""

    def generate(context, b, signature, arguments):
        return b.atomic_rmw("add", _pointer(b, _i64, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def integer(typingctx, address):
    """Load a 64-bit integer."""

    def generate(context, b, signature, arguments):
        return _load(b, _i64, arguments[0])

    return types.int64(types.int64), generate


Pair = tuple[Value, Value]
Reader = tuple[Callable[[Value, int], Pair], Callable[[Value, Value], Pair]]


def mxfp4_reader(context: Any, b: Builder, arguments: tuple[Value, ...]) -> Reader:
    """Return a reader of the values in the low, and in the high halves of a group's 16 bytes.

    These are the even and the odd positions; where `halves` is not 0, the first 16 and the last 16 positions. Sums over
    these are put in the order of the former, so that they are added up in one order. block, scale: bytes from one group
    to the next.
    """
    blocks, scales, table, block, scale, halves, groups = arguments
    unpack = _permuted if _wide_registers(context) else _converted

    def read(group: Value, row: int) -> Pair:
        first = b.mul(_int(row), groups)
        packed = _load(b, _bytes, blocks, b.mul(first, block), b.mul(group, block))
        exponent = b.zext(_load(b, _i8, scales, b.mul(first, scale), b.mul(group, scale)), _i64)
        return unpack(b, packed, _load(b, _f32, table, b.mul(exponent, _int(4))))

    def ordered(low: Value, high: Value) -> Pair:
        separate = b.icmp_unsigned("!=", halves, _int(0))
        even, odd = (b.shuffle_vector(low, high, ir.Constant(_ints, list(range(start, GROUP, 2)))) for start in (0, 1))
        return b.select(separate, even, low), b.select(separate, odd, high)

    return read, ordered
