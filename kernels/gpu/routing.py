"""Top-k routing on the GPU: the choice of experts, their gates, and the order in which experts read their slots.

Nothing waits for the host: how many tiles an expert needs is known on the device only, so a ragged kernel starts as
many programs as there could be (`max_tiles`), and each finds its expert and rows with `tile_of` or returns.

Reference: `workbench.kernels.routing`, whose results these equal.
Cost: reads tokens · experts · 4 bytes of logits; grouping reads the ids twice and writes 4 bytes a slot.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import narrow, on_device_of_first


class Groups(NamedTuple):
    """Slots (token · k + slot) by expert; an expert's slots are `order[offsets[e] : offsets[e + 1]]`."""

    counts: Int32[Tensor, "expert"]
    offsets: Int32[Tensor, "expert+1"]
    order: Int32[Tensor, "slots"]


@triton.jit
def _top_k(logits, ids, tokens, E: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    WIDTH: tl.constexpr = triton.next_power_of_2(E)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (expert < E)[None, :]
    x = tl.load(logits + token[:, None] * E + expert[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    # Integers that sort as the floats do (-0 equals 0, NaN is largest), and below them the smaller id first: no ties.
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rank = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (rank.to(tl.int64) << 32) + (WIDTH - 1 - expert)[None, :]
    for slot in tl.static_range(SLOTS):
        best = tl.max(key, 1)
        chosen = WIDTH - 1 - (best & 0xFFFFFFFF)
        tl.store(ids + token * SLOTS + slot, chosen, mask=token < tokens)
        key = tl.where(expert[None, :] == chosen[:, None], -(1 << 63), key)


@triton.jit
def _gate(logits, ids, gates, tokens, E: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    WIDTH: tl.constexpr = triton.next_power_of_2(SLOTS)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (slot < SLOTS)[None, :]
    at = token[:, None] * SLOTS + slot[None, :]
    chosen = tl.load(ids + at, mask=inside, other=0)
    x = tl.load(logits + token[:, None] * E + chosen, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((slot < SLOTS)[None, :], x, float("-inf"))
    weight = tl.exp(x - tl.max(x, 1)[:, None])
    weight /= tl.sum(weight, 1)[:, None]
    tl.store(gates + at, narrow(weight, gates.dtype.element_ty), mask=inside)


@triton.jit
def _one_hot(ids, slots, start, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """Which expert each of STEP slots goes to [STEP, WIDTH], the ids and the slots themselves."""
    slot = start + tl.arange(0, STEP)
    chosen = tl.load(ids + slot, mask=slot < slots, other=WIDTH).to(tl.int32)
    return (chosen[:, None] == tl.arange(0, WIDTH)[None, :]).to(tl.int32), chosen, slot


@triton.jit
def _count(ids, partial, slots, E: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """How many slots of this block each expert receives."""
    WIDTH: tl.constexpr = triton.next_power_of_2(E)
    count = tl.zeros([WIDTH], tl.int32)
    for start in range(0, BLOCK, STEP):
        hot, _, _ = _one_hot(ids, slots, tl.program_id(0) * BLOCK + start, WIDTH, STEP)
        count += tl.sum(hot, 0)
    tl.store(partial + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), count)


@triton.jit
def _place(
    ids, partial, counts, offsets, order, slots, blocks,
    E: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each slot of this block to its place: its expert's offset, the earlier blocks' slots, the earlier ones here."""
    WIDTH: tl.constexpr = triton.next_power_of_2(E)
    here = tl.program_id(0)
    expert = tl.arange(0, WIDTH)
    earlier, total = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        counted = tl.load(partial + block[:, None] * WIDTH + expert[None, :], mask=(block < blocks)[:, None], other=0)
        total += tl.sum(counted, 0)
        earlier += tl.sum(tl.where((block < here)[:, None], counted, 0), 0)
    end = tl.cumsum(total, 0)
    if here == 0:
        tl.store(counts + expert, total, mask=expert < E)
        tl.store(offsets + expert + 1, end, mask=expert < E)
        tl.store(offsets, 0)
    base = end - total + earlier
    for start in range(0, BLOCK, STEP):
        hot, chosen, slot = _one_hot(ids, slots, here * BLOCK + start, WIDTH, STEP)
        place = tl.sum(hot * (base[None, :] + tl.cumsum(hot, 0) - 1), 1)
        tl.store(order + place, slot, mask=(slot < slots) & (chosen < E))
        base += tl.sum(hot, 0)


@triton.jit
def tile_of(index, offsets, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of the index-th tile (E: none), its first place in `order` and the end of its expert's."""
    WIDTH: tl.constexpr = triton.next_power_of_2(E)
    e = tl.arange(0, WIDTH)
    count = tl.load(offsets + e + 1, mask=e < E, other=0) - tl.load(offsets + e, mask=e < E, other=0)
    last = tl.cumsum(tl.where(e < E, (count + BLOCK_M - 1) // BLOCK_M, 0), 0)
    expert = tl.minimum(tl.sum((last <= index).to(tl.int32), 0), E)
    before = tl.max(tl.where(last <= index, last, 0), 0)
    start = tl.load(offsets + expert) + (index - before) * BLOCK_M
    return expert, start, tl.load(offsets + tl.minimum(expert + 1, E))


def max_tiles(slots: int, num_experts: int, block_m: int) -> int:
    """Return the largest number of tiles of `block_m` slots that any routing of `slots` slots can need."""
    return (slots + min(slots, num_experts) * (block_m - 1)) // block_m


@on_device_of_first
def top_k(logits: Float[Tensor, "tokens expert"], k: int) -> Int[Tensor, "tokens slot"]:
    """Return ids of the k largest logits, descending; equal logits go to the smaller id."""
    tokens, num_experts = logits.shape
    tile = tiles.top_k_tile(num_experts)
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    grid = (triton.cdiv(tokens, tile.blocks["BLOCK"]),)
    _top_k[grid](logits.contiguous(), ids, tokens, num_experts, k, **tile.blocks, **tile.options)
    return ids


@on_device_of_first
def gate(logits: Float[Tensor, "tokens expert"], experts: Int[Tensor, "tokens slot"]) -> Float[Tensor, "tokens slot"]:
    """Return weights of the selected experts: softmax over their logits alone; rows sum to 1."""
    return _Gate.apply(logits, experts)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, experts: Tensor) -> Tensor:
        tokens, k = experts.shape
        tile = tiles.top_k_tile(k)
        gates = torch.empty(tokens, k, dtype=logits.dtype, device=logits.device)
        grid = (triton.cdiv(tokens, tile.blocks["BLOCK"]),)
        _gate[grid](
            logits.contiguous(), experts.contiguous(), gates, tokens, logits.shape[1], k,
            **tile.blocks, **tile.options,
        )  # fmt: skip
        ctx.save_for_backward(gates, experts)
        ctx.num_experts = logits.shape[1]
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gates, experts = ctx.saved_tensors
        grad = gates * (grad - (grad * gates).sum(-1, keepdim=True))
        # Chosen ids differ within a row, so that nothing is added twice and the order cannot matter.
        return grad.new_zeros(len(grad), ctx.num_experts).scatter_add_(-1, experts, grad), None


@on_device_of_first
def group(experts: Int[Tensor, "tokens slot"], num_experts: int) -> Groups:
    """Return slots (token · k + slot) in order of the expert they go to, and among one expert's in their own order.

    Ids lie in 0 … num_experts − 1: to check that would wait for the device.
    """
    flat, device = experts.contiguous().flatten(), experts.device
    tile = tiles.group_tile(len(flat), num_experts)
    blocks = triton.cdiv(len(flat), tile.blocks["BLOCK"])
    width = triton.next_power_of_2(num_experts)

    def empty(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int32, device=device)

    partial, groups = empty(blocks * width), Groups(empty(num_experts), empty(num_experts + 1), empty(len(flat)))
    sizes = {k: tile.blocks[k] for k in ("BLOCK", "STEP")}
    _count[(blocks,)](flat, partial, len(flat), num_experts, **sizes, **tile.options)
    _place[(blocks,)](
        flat, partial, *groups, len(flat), blocks, num_experts, **tile.blocks, **tile.options
    )  # fmt: skip
    return groups
