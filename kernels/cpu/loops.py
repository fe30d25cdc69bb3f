"""Loops compiled for this processor: inner products of a few rows with MXFP4 and with bfloat16 matrices.

A matrix is read once, in the order of memory, and each of its values is widened to float32 in registers. numba compiles
the loops; their innermost part is written as LLVM vectors of 16 floats, which become AVX-512, AVX2 or NEON
instructions. With AVX-512 a value of MXFP4 is looked up by a permutation of a register that holds all 16 values times
the scale. Elsewhere its bits are put where float16 has its sign, its two lowest exponent bits and its highest mantissa
bit, and the processor's conversion to float32 does the rest. Both are exact.

The sum over the inputs has the same order for one row as for 32: a row's result does not depend on the other rows.

All arguments are integers: addresses, and sizes in elements. Loops and vectors are in one file because numba's cache on
disk compares this file's age only.

Measured, one thread (Zen 4, in cache): 25 · 10^9 values of MXFP4 a second with AVX-512, 11 · 10^9 with AVX2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
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


def _permute(b: Builder, packed: Value, table: Value) -> tuple[Value, Value]:
    permute = _function(b, "llvm.x86.avx512.permvar.sf.512", _floats, _floats, _ints)  # reads four bits of an index
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


_Pair = tuple[Value, Value]
_Reader = tuple[Callable[[Value, int], _Pair], Callable[[Value, Value], _Pair]]


def _mxfp4(context: Any, b: Builder, arguments: tuple[Value, ...]) -> _Reader:
    """Return a reader of the values in the low, and in the high halves of a group's 16 bytes.

    These are the even and the odd positions; where `halves` is not 0, the first 16 and the last 16 positions. Sums over
    these are put in the order of the former, so that they are added up in one order. block, scale: bytes from one group
    to the next.
    """
    blocks, scales, table, block, scale, halves, groups = arguments
    unpack = _permuted if _wide_registers(context) else _converted

    def read(group: Value, row: int) -> _Pair:
        first = b.mul(_int(row), groups)
        packed = _load(b, _bytes, blocks, b.mul(first, block), b.mul(group, block))
        exponent = b.zext(_load(b, _i8, scales, b.mul(first, scale), b.mul(group, scale)), _i64)
        return unpack(b, packed, _load(b, _f32, table, b.mul(exponent, _int(4))))

    def ordered(low: Value, high: Value) -> _Pair:
        separate = b.icmp_unsigned("!=", halves, _int(0))
        even, odd = (b.shuffle_vector(low, high, ir.Constant(_ints, list(range(start, GROUP, 2)))) for start in (0, 1))
        return b.select(separate, even, low), b.select(separate, odd, high)

    return read, ordered


def _bfloat16(context: Any, b: Builder, arguments: tuple[Value, ...]) -> _Reader:
    """Return a reader of 32 consecutive values, in two halves."""
    matrix, groups = arguments

    def read(group: Value, row: int) -> _Pair:
        at = b.mul(b.add(b.mul(_int(row), groups), group), _int(2 * GROUP))

        def half(offset: int) -> Value:
            bits = b.zext(_load(b, _words, matrix, at, _int(offset)), _ints)
            return b.bitcast(b.shl(bits, _repeat(_ints, 16)), _floats)

        return half(0), half(2 * LANES)

    return read, lambda low, high: (low, high)


def _inner_products(reader: Callable[..., Any], sources: int, ahead: int, outputs: int, rows: int) -> Any:
    """Return an intrinsic: inner products of `outputs` rows of a matrix with `rows` rows of inputs.

    ahead: bytes of a group; with them, the groups of the next `outputs` rows are asked for while these are read. The
    processor itself does not foresee that the rows of a tile are read side by side. 0 where it does, as for one row.
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


@intrinsic
def _unpack_group(typingctx, source, group, result):
    """Write the 32 values of a group of MXFP4 as bfloat16, which holds them exactly, in their order."""

    def generate(context, b, signature, arguments):
        source, group, result = arguments
        layout = (_int(LANES), _int(1), _int(0), _int(0))
        even, odd = _mxfp4(context, b, (*cgutils.unpack_tuple(b, source, 3), *layout))[0](group, 0)
        low = b.lshr(b.bitcast(even, _ints), _repeat(_ints, 16))
        high = b.and_(b.bitcast(odd, _ints), _repeat(_ints, 0xFFFF0000))
        b.store(b.or_(low, high), _pointer(b, _ints, result, b.mul(group, _int(2 * GROUP))), align=1)
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.int64, 3), types.int64, types.int64), generate


def _transposed(b: Builder, rows: list[Value]) -> list[Value]:
    """Return the columns of n rows of n values: rows n / 2 apart are interleaved, log2(n) times."""
    n = len(rows)
    kind = ir.VectorType(_i32, n)
    orders = [ir.Constant(kind, [start + m // 2 + n * (m % 2) for m in range(n)]) for start in (0, n // 2)]
    for _ in range(n.bit_length() - 1):
        rows = [b.shuffle_vector(rows[m // 2], rows[m // 2 + n // 2], orders[m % 2]) for m in range(n)]
    return rows


@intrinsic
def _unpack_tile(typingctx, source, groups, group, result, stride):
    """Write a group of each of 16 outputs as float32: a row of the result for each input, `stride` bytes apart."""

    def generate(context, b, signature, arguments):
        source, groups, group, result, stride = arguments
        blocks, scales, table = cgutils.unpack_tuple(b, source, 3)
        factors, rows = ir.Constant(_floats, ir.Undefined), []
        for output in range(LANES):
            at = b.add(b.mul(_int(output), groups), group)
            rows.append(_load(b, _bytes, blocks, b.mul(at, _int(LANES))))
            exponent = b.zext(_load(b, _i8, scales, at), _i64)
            factor = _load(b, _f32, table, b.mul(exponent, _int(4)))
            factors = b.insert_element(factors, factor, ir.Constant(_i32, output))
        for position, packed in enumerate(_transposed(b, rows)):
            if _wide_registers(context):
                values = [b.fmul(part, factors) for part in _permute(b, packed, _all_values())]
            else:
                values = list(_convert(b, packed, factors))
            for half, part in enumerate(values):
                at = b.mul(stride, _int(2 * position + half))
                b.store(part, _pointer(b, _floats, result, at), align=1)
        return context.get_dummy_value()

    size = types.int64
    return types.void(types.UniTuple(size, 3), size, size, size, size), generate


@intrinsic
def _widen_tile(typingctx, source, inputs, result, stride):
    """Write 16 inputs of 16 outputs of a bfloat16 matrix as float32: a row of the result for each input."""

    def generate(context, b, signature, arguments):
        source, inputs, result, stride = arguments
        half, together = LANES // 2, ir.Constant(_ints, list(range(LANES)))
        kind = ir.VectorType(_i16, half)

        def columns(first_output: int, first_input: int) -> list[Value]:
            at = [b.mul(inputs, _int(2 * (first_output + output))) for output in range(half)]
            return _transposed(b, [_load(b, kind, source, offset, _int(2 * first_input)) for offset in at])

        for first in (0, half):  # squares of 8: shuffles of half registers are faster
            for position, pair in enumerate(zip(columns(0, first), columns(half, first), strict=True), first):
                bits = b.shl(b.zext(b.shuffle_vector(*pair, together), _ints), _repeat(_ints, 16))
                b.store(bits, _pointer(b, _ints, result, b.mul(stride, _int(position))), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


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


# Outputs at a time: a matrix in bfloat16 is read fastest as one stream, and unpacking a few rows of MXFP4 hides
# the latency of loads. With four rows of inputs, two outputs leave registers free.
MXFP4_OUTPUTS, MXFP4_OUTPUTS_FOR_FOUR, BFLOAT16_OUTPUTS_FOR_FOUR = 4, 2, 2
_mxfp4_by_one, _mxfp4_by_two, _mxfp4_by_four = (
    _inner_products(_mxfp4, 6, LANES, outputs, rows)
    for outputs, rows in ((MXFP4_OUTPUTS, 1), (MXFP4_OUTPUTS_FOR_FOUR, 2), (MXFP4_OUTPUTS_FOR_FOUR, 4))
)
_bfloat16_by_one, _bfloat16_by_four = (
    _inner_products(_bfloat16, 1, 0, outputs, rows) for outputs, rows in ((1, 1), (BFLOAT16_OUTPUTS_FOR_FOUR, 4))
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


def _unpack_groups(blocks, scales, table, groups, results):
    """Write groups of MXFP4, which follow each other in memory, as bfloat16 [32 · groups]."""
    for group in range(groups):
        _unpack_group((blocks, scales, table), group, results)


def _unpack_columns(blocks, scales, table, groups, outputs, results):
    """Write a matrix of MXFP4 [outputs, groups] as float32 [32 · groups, outputs], where LANES divides the outputs."""
    for output in range(0, outputs, LANES):
        source = (blocks + output * groups * LANES, scales + output * groups, table)
        for group in range(groups):
            _unpack_tile(source, groups, group, results + 4 * (group * GROUP * outputs + output), 4 * outputs)


def _widen_columns(matrix, inputs, outputs, results):
    """Write a bfloat16 matrix [outputs, inputs] as float32 [inputs, outputs], where LANES divides both."""
    for output in range(0, outputs, LANES):
        for start in range(0, inputs, LANES):
            source = matrix + 2 * (output * inputs + start)
            _widen_tile(source, inputs, results + 4 * (start * outputs + output), 4 * outputs)


class Loops(NamedTuple):
    """The compiled loops of this module."""

    dense_rows: Callable[..., None]
    expert_rows: Callable[..., None]
    unpack_groups: Callable[..., None]
    unpack_columns: Callable[..., None]
    widen_columns: Callable[..., None]


def compile_all() -> Loops:
    """Return the compiled loops: from the cache on disk if it has them."""

    def compiled(loop: Callable[..., None], arguments: int) -> Callable[..., None]:
        signature = types.void(*[types.int64] * arguments)
        try:
            return njit(signature, nogil=True, cache=True)(loop)
        except (RuntimeError, OSError):  # no folder for the cache can be written
            return njit(signature, nogil=True)(loop)

    return Loops(
        compiled(_dense_rows, 8),
        compiled(_expert_rows, 17),
        compiled(_unpack_groups, 5),
        compiled(_unpack_columns, 6),
        compiled(_widen_columns, 4),
    )
