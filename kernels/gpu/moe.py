"""The routed expert layer on the GPU, from packed weights: two ragged matmuls and a sum over slots.

Slots are read in the order of their expert and written back in their own, so that every stage is [tokens · slot, …]
and a tap costs nothing but its own tensor. Matmuls accumulate in float32; the bias, and where nothing is tapped the
activation, are applied before the store. The gradient (of x, gates and every tapped stage; the weights are frozen and
get none) is recomputed from x rather than kept, and reads the same packed bytes. Every sum has a fixed order.

Reference: `workbench.kernels.moe`; openai/gpt-oss, gpt_oss/torch/model.py, swiglu and MLPBlock.forward.
Cost for T tokens: 6 · T · k · d_model · d_mlp flops, and 10 in the backward pass, of which 4 recompute; 3 · d_model ·
d_mlp · 17/32 bytes per expert that is hit, 5 in the backward pass, and about 4 · T · k · (d_mlp + d_model) of stages.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import dot, narrow, on_device_of_first
from workbench.kernels.gpu.mxfp4 import dot_packed, load_tile, operand, unpack
from workbench.kernels.gpu.routing import Groups, group, max_tiles, tile_of
from workbench.kernels.moe import ActivationHook, ActivationHooks, Experts
from workbench.kernels.mxfp4 import Mxfp4


@triton.jit
def _clamp_gate(x, limit):
    return tl.where(x > limit, limit, x)  # a GPU's minimum would turn NaN into the limit


@triton.jit
def _clamp_up(x, limit):
    return tl.where(x < -limit, -limit, _clamp_gate(x, limit))


@triton.jit
def _swiglu(pairs, limit, alpha):
    """Interleaved gates and ups [rows, 2F] → gate · sigmoid(alpha · gate) · (up + 1) [rows, F], clamped."""
    rows: tl.constexpr = pairs.shape[0]
    gate, up = tl.split(pairs.to(tl.float32).reshape(rows, pairs.shape[1] // 2, 2))
    gate = _clamp_gate(gate, limit)
    return gate / (1 + tl.exp(-alpha * gate)) * (_clamp_up(up, limit) + 1)


@triton.jit
def _linear(
    x, blocks, scales, bias, order, offsets, out, limit, alpha,
    stride_expert, stride_tile_row, stride_tile_column, stride_row,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, ACTIVATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = x[slot // SHARED] · W[expert]ᵀ + bias[expert], then with ACTIVATE the clamped SwiGLU."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i = tl.program_id(0) % columns
    expert, start, end = tile_of(tl.program_id(0) // columns, offsets, E, BLOCK_M)
    if expert == E:
        return
    place = start + tl.arange(0, BLOCK_M)
    slot = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rows = x + (slot // SHARED)[:, None] * K + k[None, :]
    group = expert.to(tl.int64) * stride_expert
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in range((K + BLOCK_K - 1) // BLOCK_K):
        if K % BLOCK_K:
            a = tl.load(rows + j * BLOCK_K, mask=k[None, :] < K - j * BLOCK_K, other=0.0)
        else:
            a = tl.load(rows + j * BLOCK_K)
        w, s = load_tile(
            blocks, scales, group, i, j, stride_tile_row, stride_tile_column, stride_row, N, K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        acc = dot_packed(a, w, s, acc)
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    h = narrow(acc, out.dtype.element_ty)
    if ACTIVATE:
        # h is rounded first, as it would be if it were stored: a tap must not change the numbers.
        post = narrow(_swiglu(h, limit, alpha), out.dtype.element_ty)
        f = i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        inside = (place < end)[:, None] & (f < N // 2)[None, :]
        tl.store(out + slot[:, None] * (N // 2) + f[None, :], post, mask=inside)
    else:
        tl.store(out + slot[:, None] * N + n[None, :], h, mask=(place < end)[:, None] & (n < N)[None, :])


@triton.jit
def _transposed(
    y, blocks, scales, order, offsets, out, stride_expert, stride_tile_row, stride_tile_column, stride_row,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = y[slot // SHARED] · W[expert]: the way back through `_linear`."""
    columns: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    j = tl.program_id(0) % columns
    expert, start, end = tile_of(tl.program_id(0) // columns, offsets, E, BLOCK_M)
    if expert == E:
        return
    place = start + tl.arange(0, BLOCK_M)
    slot = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    rows = y + (slot // SHARED)[None, :] * N + n[:, None]
    group = expert.to(tl.int64) * stride_expert
    # The unpacked weight is the left operand: as the right one it would get no wgmma on sm_90.
    acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for i in range((N + BLOCK_N - 1) // BLOCK_N):
        if N % BLOCK_N:
            b = tl.load(rows + i * BLOCK_N, mask=n[:, None] < N - i * BLOCK_N, other=0.0)
        else:
            b = tl.load(rows + i * BLOCK_N)
        w, s = load_tile(
            blocks, scales, group, i, j, stride_tile_row, stride_tile_column, stride_row, N, K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        acc = dot(unpack(w, s, y.dtype.element_ty).T, b, acc)
    k = j * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k < K)[:, None] & (place < end)[None, :]
    tl.store(out + slot[None, :] * K + k[:, None], narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(y, gates, out, D, SLOTS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """out[token] = sum over slots, in their order, of (gate ·) y[token, slot]."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(y + (token * SLOTS + slot) * D + d, mask=d < D, other=0.0).to(tl.float32)
        if GATED:
            row *= tl.load(gates + token * SLOTS + slot).to(tl.float32)
        total += row
    tl.store(out + token * D + d, narrow(total, out.dtype.element_ty), mask=d < D)


@triton.jit
def _activate(h, post, limit, alpha, F: tl.constexpr, BLOCK: tl.constexpr):
    """One slot: h [2F] → post [F], as `_linear` computes it where no tap stands between."""
    slot = tl.program_id(0).to(tl.int64)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        both = start * 2 + tl.arange(0, BLOCK * 2)
        pairs = tl.load(h + slot * 2 * F + both, mask=both < 2 * F, other=0.0)
        value = _swiglu(pairs.reshape(1, BLOCK * 2), limit, alpha).reshape(BLOCK)
        tl.store(post + slot * F + f, narrow(value, post.dtype.element_ty), mask=f < F)


@triton.jit
def _swiglu_backward(
    h, dpost, gates, dh, dgates, limit, alpha, F: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One slot: h [2F] and the gradient of its activation [F] → the gradient of h, which may be h's own memory.

    GATED: dpost lacks the factor of the slot's gate weight, and dpost · post is that weight's gradient.
    """
    slot = tl.program_id(0).to(tl.int64)
    weight, dgate = 1.0, tl.zeros([BLOCK], tl.float32)
    if GATED:
        weight = tl.load(gates + slot).to(tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        both = start * 2 + tl.arange(0, BLOCK * 2)
        pairs = tl.load(h + slot * 2 * F + both, mask=both < 2 * F, other=0.0).to(tl.float32)
        raw_gate, raw_up = tl.split(pairs.reshape(BLOCK, 2))
        d = tl.load(dpost + slot * F + f, mask=f < F, other=0.0).to(tl.float32)
        gate, up = _clamp_gate(raw_gate, limit), _clamp_up(raw_up, limit) + 1
        sigmoid = 1 / (1 + tl.exp(-alpha * gate))
        if GATED:
            dgate += d * gate * sigmoid * up
            d *= weight
        to_gate = tl.where(raw_gate <= limit, d * up * sigmoid * (1 + alpha * gate * (1 - sigmoid)), 0.0)
        to_up = tl.where(tl.abs(raw_up) <= limit, d * gate * sigmoid, 0.0)
        pairs = tl.join(to_gate, to_up).reshape(BLOCK * 2)
        tl.store(dh + slot * 2 * F + both, narrow(pairs, dh.dtype.element_ty), mask=both < 2 * F)
    if GATED:
        tl.store(dgates + slot, tl.sum(dgate, 0))


class _Layer(NamedTuple):
    """What the launchers share: the weights and who reads them."""

    weights: Experts
    groups: Groups
    k: int

    @property
    def num_experts(self) -> int:
        return len(self.groups.counts)

    def linear(self, x: Tensor, matrix: Any, bias: Tensor, shared: int, activate: bool = False) -> Tensor:
        """x [slots / shared, inputs] through each slot's expert: [slots, outputs], or half of them when activated."""
        slots = len(self.groups.order)
        tile = tiles.moe_tile(slots, self.num_experts, x.dtype, tiles.target(x))
        w, x = operand(matrix, tile.blocks["BLOCK_N"], tile.blocks["BLOCK_K"]), x.contiguous()
        out = x.new_empty(slots, w.out // 2 if activate else w.out)
        grid = (
            max_tiles(slots, self.num_experts, tile.blocks["BLOCK_M"]) * triton.cdiv(w.out, tile.blocks["BLOCK_N"]),
        )
        _linear[grid](
            x, w.blocks, w.scales, bias.contiguous(), self.groups.order, self.groups.offsets, out,
            self.weights.limit, self.weights.alpha, *w.strides,
            self.num_experts, w.out, w.columns, shared, activate, **tile.blocks, **tile.options,
        )  # fmt: skip
        return out

    def transposed(self, y: Tensor, matrix: Any, shared: int) -> Tensor:
        """y [slots / shared, outputs] back through each slot's expert: [slots, inputs]."""
        slots = len(self.groups.order)
        tile = tiles.moe_transposed_tile(slots, self.num_experts, y.dtype, tiles.target(y))
        w, y = operand(matrix, tile.blocks["BLOCK_N"], tile.blocks["BLOCK_K"]), y.contiguous()
        out = y.new_empty(slots, w.columns)
        columns = triton.cdiv(w.columns, tile.blocks["BLOCK_K"])
        _transposed[(max_tiles(slots, self.num_experts, tile.blocks["BLOCK_M"]) * columns,)](
            y, w.blocks, w.scales, self.groups.order, self.groups.offsets, out, *w.strides,
            self.num_experts, w.out, w.columns, shared, **tile.blocks, **tile.options,
        )  # fmt: skip
        return out

    def gate_up(self, x: Tensor, activate: bool) -> Tensor:
        return self.linear(x, self.weights.gate_up, self.weights.gate_up_bias, self.k, activate)

    def down(self, post: Tensor) -> Tensor:
        return self.linear(post, self.weights.down, self.weights.down_bias, 1)

    def combine(self, y: Tensor, gates: Tensor | None) -> Tensor:
        """[slots, d_model] → [tokens, d_model], weighted by gates [tokens, slot] where there are any."""
        tile = tiles.combine_tile()
        out = y.new_empty(len(y) // self.k, y.shape[1])
        grid = (len(out), triton.cdiv(y.shape[1], tile.blocks["BLOCK"]))
        _combine[grid](
            y, y if gates is None else gates.contiguous(), out, y.shape[1], self.k, gates is not None,
            **tile.blocks, **tile.options,
        )  # fmt: skip
        return out

    def activate(self, h: Tensor) -> Tensor:
        """[slots, 2 · d_mlp] → [slots, d_mlp]."""
        tile, post = tiles.swiglu_tile(), h.new_empty(len(h), h.shape[1] // 2)
        _activate[(len(h),)](
            h, post, self.weights.limit, self.weights.alpha, post.shape[1], **tile.blocks, **tile.options
        )  # fmt: skip
        return post

    def activate_backward(
        self, h: Tensor, dpost: Tensor, gates: Tensor | None = None, *, overwrite: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return gradients of h, in its memory if that is free, and with gates the share of theirs in dpost."""
        tile, dh = tiles.swiglu_tile(), h if overwrite else torch.empty_like(h)
        dgates = torch.empty(len(h), dtype=torch.float32, device=h.device)
        _swiglu_backward[(len(h),)](
            h, dpost.contiguous(), h if gates is None else gates.contiguous(), dh, dgates,
            self.weights.limit, self.weights.alpha, dpost.shape[1], gates is not None,
            **tile.blocks, **tile.options,
        )  # fmt: skip
        return dh, dgates

    def inward_backward(self, dh: Tensor) -> Tensor:
        return self.combine(self.transposed(dh, self.weights.gate_up, 1), None)


class _FusedMoE(torch.autograd.Function):
    """The layer with nothing tapped: of all its stages only x and the gates are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x, gates, experts)
        ctx.layer = layer
        return layer.combine(layer.down(layer.gate_up(x, activate=True)), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, gates, experts = ctx.saved_tensors
        layer: _Layer = ctx.layer
        # A gate's gradient is grad · (W post + b): with Wᵀ grad at hand for post's, the output is not needed again.
        dpost = layer.transposed(grad, layer.weights.down, layer.k)
        dh, dgates = layer.activate_backward(layer.gate_up(x, activate=False), dpost, gates)
        of_bias = (grad.float() @ layer.weights.down_bias.float().T).gather(-1, experts)
        return layer.inward_backward(dh), (dgates.view_as(gates) + of_bias).to(gates.dtype), None, None


class _Inward(torch.autograd.Function):
    """x → h, or with `activate` → post."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Layer, activate: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.activate = layer, activate
        return layer.gate_up(x, activate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,), layer = ctx.saved_tensors, ctx.layer
        if ctx.activate:
            grad, _ = layer.activate_backward(layer.gate_up(x, activate=False), grad)
        return layer.inward_backward(grad), None, None


class _Activate(torch.autograd.Function):
    """Tapped gates and ups, interleaved again → post."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(h)
        ctx.layer = layer
        return layer.activate(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return ctx.layer.activate_backward(h, grad, overwrite=False)[0], None


class _Outward(torch.autograd.Function):
    """post → each slot's output."""

    @staticmethod
    def forward(ctx: Any, post: Tensor, layer: _Layer) -> Tensor:
        ctx.layer = layer
        return layer.down(post)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layer.transposed(grad, ctx.layer.weights.down, 1), None


class _Combine(torch.autograd.Function):
    """Each slot's output and gate → the tokens' sums."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(y, gates)
        return layer.combine(y, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, gates = ctx.saved_tensors
        wide = grad.float()[:, None]
        dy = (wide * gates.float()[..., None]).to(y.dtype).flatten(0, 1)
        return dy, (wide * y.view(*gates.shape, -1)).sum(-1).to(gates.dtype), None


@on_device_of_first
def moe(
    x: Float[Tensor, "tokens d_model"],
    experts: Int[Tensor, "tokens slot"],
    gates: Float[Tensor, "tokens slot"],
    weights: Experts,
    taps: ActivationHooks | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Sum over slots of gate · expert(x), accumulated in float32; every stage is rounded to x's dtype.

    A stage is materialised where a tap asks for it. x is bfloat16 or float32; the matrices are packed (Mxfp4)
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"the expert kernels compute in bfloat16 or float32, got {x.dtype}: convert the model")
    for matrix in (weights.gate_up, weights.down):
        if not isinstance(matrix, Mxfp4):
            kind = type(matrix).__name__
            raise TypeError(f"the expert kernels read packed matrices, got {kind}: use workbench.kernels.moe.moe")
    layer = _Layer(weights, group(experts, len(weights.gate_up_bias)), experts.shape[1])
    if taps is None or not any(taps):
        return _FusedMoE.apply(x, gates, experts, layer)

    def apply_hook(tap: ActivationHook | None, slots: Tensor) -> Tensor:
        return slots if tap is None else tap(slots.unflatten(0, experts.shape)).flatten(0, 1)

    if taps.gate or taps.up:
        h = _Inward.apply(x, layer, False)
        pairs = torch.stack([apply_hook(taps.gate, h[:, 0::2]), apply_hook(taps.up, h[:, 1::2])], -1)
        post = _Activate.apply(pairs.flatten(1), layer)
    else:
        post = _Inward.apply(x, layer, True)
    y = _Outward.apply(apply_hook(taps.post, post), layer)
    return _Combine.apply(apply_hook(taps.out, y), gates, layer)
