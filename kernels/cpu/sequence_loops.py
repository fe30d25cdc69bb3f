"""Causal attention of complete sequences in float32, by tiles: 32 queries of a head by up to 128 keys.

Queries are the lanes of vectors: scores are [key, query], so that the maximum, the sum and the mask of a query need no
sum across a vector, and weights of keys are a tile by which values are multiplied. Query heads that share keys take a
tile of them one after the other, while it is in cache. The softmax is taken in one pass over tiles of keys. NaN in
the value of a key also reaches queries that do not see it, if others of their tile do.

Keys are arranged as [block, d_head, 8], values as [d_head / 8, key, 8], the last key again up to a multiple of 8.

Reference: Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from workbench.kernels.cpu.compilation import compile_loop
from workbench.kernels.cpu.dense_tile_loops import float_products, widen_group
from workbench.kernels.cpu.row_loops import (
    _exponential,
    _store_bfloat16,
    bfloat16_at,
    float_at,
    set_bfloat16,
    set_float,
)
from workbench.kernels.cpu.tile_jobs import OUTPUTS, ROW_BYTES, clear, inline
from workbench.kernels.cpu.vectors import (
    GROUP,
    LANES,
    Value,
    _broadcast,
    _floats,
    _i32,
    _i64,
    _int,
    _ints,
    _load,
    _pointer,
    _repeat,
    _transposed,
    integer,
    take,
)

QUERIES, KEYS, BLOCK = OUTPUTS, 128, 8
ARRANGED = 32  # blocks of keys that a thread arranges at a time
_ABSENT = np.float32(-3e38)  # the score of a key that is not seen
_multiply = float_products(BLOCK)


def thread_bytes(group: int, width: int) -> int:
    """Return bytes of a thread's memory, for `group` query heads of a width that share keys.

    Of each head a tile of queries, the sums of values, the largest scores and the sums of weights; scores of one head;
    and queries of one head in bfloat16.
    """
    return group * ROW_BYTES * (2 * width + 2) + ROW_BYTES * KEYS + 2 * QUERIES * width


@intrinsic
def _multiply_rows(typingctx, rows, count, factor):
    """Multiply rows of 32 float32 by a number."""

    def generate(context, b, signature, arguments):
        rows, count, factor = arguments
        factor = _broadcast(b, factor)
        with cgutils.for_range(b, b.mul(count, _int(2)), intp=_i64) as loop:
            at = _pointer(b, _floats, rows, b.mul(loop.index, _int(4 * LANES)))
            b.store(b.fmul(b.load(at, align=64), factor), at, align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def _hide(typingctx, scores, count, distance, window):
    """Mark scores [key, query] of keys that a query does not see.

    distance: of the first key from the first query, negative before it. window: how many keys a query sees at most.
    """

    def generate(context, b, signature, arguments):
        scores, count, distance, window = arguments
        window = _broadcast(b, b.trunc(window, _i32))
        absent = _repeat(_floats, float(_ABSENT))
        with cgutils.for_range(b, count, intp=_i64) as loop:
            key = _broadcast(b, b.trunc(b.add(distance, loop.index), _i32))
            for half in (0, LANES):
                behind = b.sub(ir.Constant(_ints, list(range(half, half + LANES))), key)
                seen = b.and_(b.icmp_signed(">=", behind, _repeat(_ints, 0)), b.icmp_signed("<", behind, window))
                at = _pointer(b, _floats, scores, b.mul(loop.index, _int(ROW_BYTES)), _int(4 * half))
                b.store(b.select(seen, b.load(at, align=64), absent), at, align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _weight(b: Any, score: Value, top: Value) -> Value:
    """Return e^(score − top), or 0 below e^-80: products with smaller numbers can be subnormal, which takes long."""
    distance = b.fsub(score, top)
    negligible = b.fcmp_ordered("<", distance, _repeat(_floats, -80.0))
    return b.select(negligible, _repeat(_floats, 0.0), _exponential(b, distance))


@intrinsic
def _weigh(typingctx, scores, count, statistics, sums, width):
    """Replace scores [key, query] by weights, relative to the largest score so far.

    statistics: the largest score and the sum of weights of each query; they and the sums of values [d_head, query] are
    put in relation to the new largest score.
    """

    def generate(context, b, signature, arguments):
        scores, count, statistics, sums, width = arguments
        tops, totals, factors = [], [], []
        for half in (0, 4 * LANES):
            tops.append(cgutils.alloca_once_value(b, _load(b, _floats, statistics, _int(half))))
            totals.append(cgutils.alloca_once_value(b, _repeat(_floats, 0.0)))

        def at(rows, index, half):
            return _pointer(b, _floats, rows, b.mul(index, _int(ROW_BYTES)), _int(4 * LANES * half))

        with cgutils.for_range(b, count, intp=_i64) as loop:
            for half, top in enumerate(tops):
                score = b.load(at(scores, loop.index, half), align=64)
                b.store(b.select(b.fcmp_ordered(">", score, b.load(top)), score, b.load(top)), top)
        for half, top in enumerate(tops):
            before = _load(b, _floats, statistics, _int(4 * LANES * half))
            factors.append(_weight(b, before, b.load(top)))
            b.store(b.load(top), _pointer(b, _floats, statistics, _int(4 * LANES * half)), align=64)
        with cgutils.for_range(b, count, intp=_i64) as loop:
            for half, total in enumerate(totals):
                place = at(scores, loop.index, half)
                weight = _weight(b, b.load(place, align=64), b.load(tops[half]))
                b.store(weight, place, align=64)
                b.store(b.fadd(b.load(total), weight), total)
        for half, total in enumerate(totals):
            place = _pointer(b, _floats, statistics, _int(ROW_BYTES + 4 * LANES * half))
            b.store(b.fadd(b.fmul(b.load(place, align=64), factors[half]), b.load(total)), place, align=64)
        with cgutils.for_range(b, width, intp=_i64) as loop:
            for half, factor in enumerate(factors):
                place = at(sums, loop.index, half)
                b.store(b.fmul(b.load(place, align=64), factor), place, align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _store_queries(typingctx, sums, factors, width, count, result, stride):
    """Write sums [d_head, query], each query's times its factor, as rows of bfloat16 of the first `count` queries.

    stride: bytes from one row to the next.
    """

    def generate(context, b, signature, arguments):
        sums, factors, width, count, result, stride = arguments
        for half in (0, LANES):
            factor = _load(b, _floats, factors, _int(4 * half))
            with cgutils.for_range(b, b.sdiv(width, _int(LANES)), intp=_i64) as loop:
                first = b.mul(loop.index, _int(ROW_BYTES * LANES))
                columns = [
                    b.fmul(_load(b, _floats, sums, first, _int(ROW_BYTES * row + 4 * half)), factor)
                    for row in range(LANES)
                ]
                rows = _transposed(b, [b.bitcast(column, _ints) for column in columns])
                for query, row in enumerate(rows, half):
                    with b.if_then(b.icmp_signed(">", count, _int(query))):
                        at = b.add(result, b.add(b.mul(stride, _int(query)), b.mul(loop.index, _int(2 * LANES))))
                        _store_bfloat16(b, b.bitcast(row, _floats), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _arrange(counter, source, rows, row, key, head, heads, length, width, by_key, result):
    """Widen keys or values [rows, length, heads, width] of bfloat16; all but width have strides in bytes.

    by_key: whether the result is that of keys, [rows, heads, block, width, 8], or of values, [rows, heads, width / 8,
    key, 8].
    """
    blocks = (length + BLOCK - 1) // BLOCK
    pieces = (blocks + ARRANGED - 1) // ARRANGED
    while True:
        item = take(counter, 1)
        if item >= rows * heads * pieces:
            return
        sequence, piece = item // pieces, item % pieces
        origin = source + sequence // heads * row + sequence % heads * head
        target = result + 4 * BLOCK * blocks * width * sequence
        for block in range(piece * ARRANGED, min((piece + 1) * ARRANGED, blocks)):
            for i in range(BLOCK):
                at = origin + min(BLOCK * block + i, length - 1) * key
                for d in range(width):
                    if by_key:
                        place = (block * width + d) * BLOCK + i
                    else:
                        place = ((d // BLOCK) * blocks * BLOCK + BLOCK * block + i) * BLOCK + d % BLOCK
                    set_float(target + 4 * place, bfloat16_at(at + 2 * d))


@inline
def _fill_queries(queries, stride, count, width, scale, memory, tile):
    """Write 32 queries, the last of `count` again where one is missing, times the scale as a tile [d_head, query]."""
    if count < QUERIES:
        for query in range(QUERIES):
            for d in range(width):
                value = bfloat16_at(queries + min(query, count - 1) * stride + 2 * d)
                set_bfloat16(memory + 2 * (query * width + d), value)
        queries, stride = memory, 2 * width
    for first in range(0, width, GROUP):
        for half in range(2):
            at = queries + LANES * half * stride + 2 * first
            widen_group(at, stride // 2, tile + ROW_BYTES * first + 4 * LANES * half)
    _multiply_rows(tile, width, scale)


@inline
def _add_keys(tile, keys, values, first, count, length, before, window, width, scores, statistics, sums):
    """Add `count` keys from `first` on to the softmax of 32 queries of a head, of which `before` come first.

    length: of the values of 8 dimensions, in keys.
    """
    clear(scores, count)
    for block in range(0, count, BLOCK):
        _multiply(tile, keys + 4 * width * (first + block), scores + ROW_BYTES * block, width)
    if first + count - 1 > before or first <= before + QUERIES - 1 - window:
        _hide(scores, count, first - before, window)
    _weigh(scores, count, statistics, sums, width)
    for d in range(0, width, BLOCK):
        _multiply(scores, values + 4 * (d * length + BLOCK * first), sums + ROW_BYTES * d, count)


@inline
def _write(statistics, sums, sink, head, count, width, z, lse, p, heads):
    """Write attention, log-sum-exp and the sink's probability of `count` queries of a head.

    sink: the address of the head's sink, or 0.
    """
    for query in range(count):
        top, total = float_at(statistics + 4 * query), float_at(statistics + ROW_BYTES + 4 * query)
        own = top + math.log(total)
        remaining = np.float32(1)
        if sink:
            score = float_at(sink)
            set_float(p + 4 * (query * heads + head), np.float32(1 / (1 + math.exp(own - score))))
            remaining = np.float32(1 / (1 + math.exp(score - own)))
            own = max(own, score) + math.log1p(math.exp(-abs(own - score)))
        set_float(lse + 4 * (query * heads + head), np.float32(own))
        set_float(statistics + 4 * query, remaining / total)
    _store_queries(sums, statistics, width, count, z + 2 * width * head, 2 * width * heads)


def _attend(
    counter, memory, size, q, rows, queries, heads, first_head, groups, group, width, keys, values, length, starts,
    window, scale, sinks, z, lse, p,
):  # fmt: skip
    """Attend to arranged keys of `groups` heads of keys, the first of which belongs to query head `first_head`.

    memory: of the threads, `size` bytes each, after a counter that shares it out. q, z: bfloat16 [rows, queries, heads,
    width]. keys, values: of `length` keys a row, a multiple of 8. starts: the position of each row's first query.
    window: how many keys a query sees at most. sinks: of the heads, or 0. lse, p: float32 [rows, queries, heads].
    """
    tiles = memory + 64 + size * take(memory, 1)
    sums = tiles + ROW_BYTES * group * width
    statistics = sums + ROW_BYTES * group * width
    scores = statistics + 2 * ROW_BYTES * group
    narrow = scores + ROW_BYTES * KEYS
    blocks, stride = (queries + QUERIES - 1) // QUERIES, 2 * heads * width
    while True:
        item = take(counter, 1)
        if item >= rows * groups * blocks:
            return
        start = (blocks - 1 - item // (rows * groups)) * QUERIES  # the longest first
        sequence = item % (rows * groups)
        row, own = sequence // groups, sequence % groups
        count = min(QUERIES, queries - start)
        before = integer(starts + 8 * row) + start
        at = row * queries + start
        head = first_head + own * group
        offset = 4 * sequence * length * width
        for n in range(group):
            source = q + at * stride + 2 * width * (head + n)
            _fill_queries(source, stride, count, width, scale, narrow, tiles + ROW_BYTES * width * n)
            for lane in range(QUERIES):
                set_float(statistics + 2 * ROW_BYTES * n + 4 * lane, _ABSENT)
        clear(sums, group * width)
        for n in range(group):
            clear(statistics + 2 * ROW_BYTES * n + ROW_BYTES, 1)
        end = min(length, (before + count + BLOCK - 1) // BLOCK * BLOCK)
        first = max(0, before - window + 1) // BLOCK * BLOCK
        while first < end:
            some = min(KEYS, end - first)
            for n in range(group):
                _add_keys(
                    tiles + ROW_BYTES * width * n, keys + offset, values + offset, first, some, length, before, window,
                    width, scores, statistics + 2 * ROW_BYTES * n, sums + ROW_BYTES * width * n,
                )  # fmt: skip
            first += some
        for n in range(group):
            sink = sinks + 4 * (head + n) if sinks else 0
            _write(
                statistics + 2 * ROW_BYTES * n, sums + ROW_BYTES * width * n, sink, head + n, count, width,
                z + at * stride, lse + 4 * at * heads, p + 4 * at * heads, heads,
            )  # fmt: skip


class SequenceLoops(NamedTuple):
    """The compiled loops of this module."""

    arrange: Callable[..., None]
    attend: Callable[..., None]


def compile_all() -> SequenceLoops:
    """Return the compiled loops: from the cache on disk if it has them."""
    address = types.int64
    return SequenceLoops(
        compile_loop(_arrange, *[address] * 11),
        compile_loop(_attend, *[address] * 16, types.float32, *[address] * 4),
    )
