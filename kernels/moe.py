"""The routed expert layer: gather → gate/up matmul → clamped SwiGLU → down matmul → gate weight → combine.

The rows of the first matrix interleave gate (0, 2, 4 …) and up (1, 3, 5 …); the gate is clamped from above
only, up on both sides, and up enters as up + 1. Each expert's bias is added before its gate weight.

Reference: openai/gpt-oss, gpt_oss/torch/model.py, swiglu and MLPBlock.forward.
Cost for T tokens: 6 · T · k · d_model · d_mlp multiply-adds; 3 · d_model · d_mlp · 17/32 bytes per expert that is hit.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels import cpu, dispatch, ggml
from workbench.kernels.chunking import chunked
from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.mxfp4 import Mxfp4, linear
from workbench.kernels.parallel import parallel_map
from workbench.kernels.routing import group

_TOKENS = 8192  # at a time: bounds the memory of a long prompt, and unpacking every expert again costs 3 % of its work
_LIGHT = 2**20  # values of an expert's matrix below which handing it to a thread costs more than it saves
# Up to these the compiled CPU kernels multiply by packed matrices without unpacking them: 32 tokens, or 256 (all slots
# take about 100 MB) where an expert has 24 rows on average. Measured, one thread (Emerald Rapids without AMX), a
# matrix of 5760 × 2880 and 8, 16, 24, 32 rows: 3.1, 5.8, 8.7 and 11.6 ms; unpacked for torch 5.4, 7.0, 8.8 and 10.3.
# With AVX-512 more than 32 tokens take its tiles: 4, 9, 16, 24 rows 1.8, 2.3, 3.0 and 4.0 ms.
_FEW_TOKENS, _SHORT, _FEW_ROWS = 32, 256, 24
_SHARE_ROWS = 2048  # that experts multiply at a time, unless one has more: 40 MB in the width of gpt-oss-20b
ActivationHook = Callable[[Tensor], Tensor]


class LoraWeight(NamedTuple):
    """The matrices of all experts and beside each a low-rank update: x · base + x · a · b."""

    base: Mxfp4 | GgmlMxfp4 | Float[Tensor, "expert inputs outputs"]
    a: Float[Tensor, "expert inputs rank"]
    b: Float[Tensor, "expert rank outputs"]


class Experts(NamedTuple):
    """The weights of one layer's experts, stacked; the matrices packed, or dense as [expert, inputs, outputs]."""

    gate_up: Mxfp4 | GgmlMxfp4 | LoraWeight | Float[Tensor, "expert d_model 2*d_mlp"]
    gate_up_bias: Float[Tensor, "expert 2*d_mlp"]
    down: Mxfp4 | GgmlMxfp4 | LoraWeight | Float[Tensor, "expert d_mlp d_model"]
    down_bias: Float[Tensor, "expert d_model"]
    limit: float
    alpha: float


class ActivationHooks(NamedTuple):
    """Hooks on activations inside the layer, each [tokens, slot, …]; the layer goes on with what they return."""

    gate: ActivationHook | None = None
    up: ActivationHook | None = None
    post: ActivationHook | None = None
    out: ActivationHook | None = None


def swiglu(gate: Float[Tensor, "*rows d_mlp"], up: Float[Tensor, "*rows d_mlp"], limit: float, alpha: float) -> Tensor:
    """Return gate · sigmoid(alpha · gate) · (up + 1) [*rows d_mlp]; gate is clamped from above, up on both sides."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def _swiglu_in_place(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """As `swiglu`, in the memory of its arguments: new memory for each step takes three times as long."""
    gate.clamp_(max=limit)
    return (alpha * gate).sigmoid_().mul_(gate).mul_(up.clamp_(-limit, limit).add_(1))


def moe(
    x: Float[Tensor, "tokens d_model"],
    experts: Int[Tensor, "tokens slot"],
    gates: Float[Tensor, "tokens slot"],
    weights: Experts,
    taps: ActivationHooks | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Sum over slots of gate · expert(x), accumulated in at least float32.

    An expert's gate, up and activation live only while it runs, unless they are tapped. The numbers are the same
    either way: every stage is rounded to x's dtype. Dense and adapted experts are torch's business on every device.
    Few tokens on a CPU take the compiled kernels of `workbench.kernels.cpu` where those apply.
    """
    packed = isinstance(weights.gate_up, Mxfp4) and isinstance(weights.down, Mxfp4)
    if packed and (gpu := dispatch.triton("moe", x)):
        return gpu.moe(x, experts, gates, weights, taps)
    taps = taps or ActivationHooks()
    products = cpu.compiled(x, weights.gate_up_bias, weights.down_bias) if _few(experts, weights) else None
    if products and not products.covers_experts(x, weights.gate_up, weights.down):
        products = None
    mapped = isinstance(weights.gate_up, GgmlMxfp4)
    if mapped and len(x) > _FEW_TOKENS and _tiles(x, weights.gate_up, weights.gate_up_bias):
        products = None  # tiles take the published order, of one expert at a time, and give its results
    by_rows = len(x) <= _FEW_TOKENS
    if any(taps) or len(x) <= _TOKENS:
        return _layer(x, experts, gates, weights, taps, products, by_rows)
    parts = zip(x.split(_TOKENS), experts.split(_TOKENS), gates.split(_TOKENS), strict=True)
    return torch.cat([_layer(*part, weights, taps, products, by_rows) for part in parts])


def _few(experts: Tensor, weights: Experts) -> bool:
    """Return whether the tokens of these choices [tokens slot] are few enough for the compiled CPU kernels."""
    tokens = len(experts)
    rows = experts.numel() / len(weights.gate_up_bias)
    return 0 < tokens <= (_SHORT if rows <= _FEW_ROWS else _FEW_TOKENS)


def _tiles(x: Tensor, matrix: object, bias: Tensor) -> ModuleType | None:
    """Return `workbench.kernels.cpu.tiles` where it multiplies many rows x by one of these packed matrices."""
    if not isinstance(matrix, Mxfp4 | GgmlMxfp4):
        return None
    tiles = cpu.many_rows(x, *(matrix if isinstance(matrix, Mxfp4) else matrix.parts), bias)
    if isinstance(matrix, GgmlMxfp4):  # of which a copy of one matrix is made in the published order
        return tiles if tiles and tiles.covers_outputs(bias.shape[1]) else None
    return tiles if tiles and tiles.covers_packed(*matrix) else None


def _layer(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    weights: Experts,
    taps: ActivationHooks,
    products: ModuleType | None,
    by_rows: bool,
) -> Tensor:
    """Compute `moe` in torch, but the matrix products by the compiled `products` where these are given.

    by_rows: the prompt that these tokens are a part of has few; the products of others are those of tiles.
    """
    k = experts.shape[1]
    slots = products.Slots(experts, len(weights.gate_up_bias)) if products else None
    d_mlp, wide = weights.gate_up_bias.shape[1] // 2, torch.promote_types(x.dtype, torch.float32)

    heavy = x.device.type == "cpu" and 2 * d_mlp * x.shape[1] > _LIGHT
    apart = heavy and not torch.is_grad_enabled() and torch.get_num_threads() > 1

    def per_expert(stage: Callable[[int, Tensor], Tensor], width: int) -> Tensor:
        """Return [tokens slot width] from what `stage` makes of an expert and its slots."""
        order, counts = group(experts, weights.gate_up_bias.shape[0])
        hit = [(e, rows) for e, rows in enumerate(order.split(counts.tolist())) if len(rows)]
        if apart and _tiles(x, weights.gate_up, weights.gate_up_bias):
            result = x.new_empty(len(order), width)
            parallel_map(lambda item: result.index_copy_(0, item[1], stage(*item)), hit)
            return result.unflatten(0, (-1, k))
        parts = parallel_map(lambda item: stage(*item), hit) if apart else [stage(e, rows) for e, rows in hit]
        return torch.cat(parts)[order.argsort()].unflatten(0, (-1, k))

    def gate_up(e: int, rows: Tensor) -> Tensor:
        return _linear(x, rows // k, weights.gate_up, weights.gate_up_bias, e)

    def down(e: int, post: Tensor, rows: Tensor | None = None) -> Tensor:
        return _linear(post, rows, weights.down, weights.down_bias, e)

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        copied = wide != gate.dtype and not torch.is_grad_enabled()
        compute = _swiglu_in_place if copied else swiglu
        return compute(gate.to(wide), up.to(wide), weights.limit, weights.alpha).to(x.dtype)

    def activated(e: int, rows: Tensor) -> Tensor:
        return activated_pairs(gate_up(e, rows))

    def activated_pairs(pairs: Tensor) -> Tensor:
        gate, up = apply_hook(taps.gate, pairs[..., 0::2]), apply_hook(taps.up, pairs[..., 1::2])
        steps = cpu.slot_steps((pairs, gate, up))
        if steps and steps.covers(d_mlp):
            pairs = torch.stack([gate, up], -1).flatten(-2) if taps.gate or taps.up else pairs
            return steps.swiglu(pairs, weights.limit, weights.alpha)
        return activation(gate, up)

    def apply_hook(tap: ActivationHook | None, slots: Tensor) -> Tensor:
        return slots if tap is None else tap(slots)

    def launcher(rows: Tensor, matrix: object, bias: Tensor) -> Any:
        """Return the module whose `expert_linear` multiplies these rows: that of few rows, or that of tiles."""
        tiled = isinstance(matrix, Mxfp4) and not by_rows
        return (_tiles(rows, matrix, bias) if tiled else None) or products

    if products or taps.gate or taps.up:
        if products:
            first = weights.gate_up, weights.gate_up_bias
            h = launcher(x, *first).expert_linear(x, *first, slots)
        else:
            h = per_expert(gate_up, 2 * d_mlp)
        post = activated_pairs(h)
    elif taps.post:
        post = per_expert(activated, d_mlp)
    if products or taps.gate or taps.up or taps.post:
        post = apply_hook(taps.post, post).flatten(0, 1)
        if products and cpu.compiled(post) and products.covers_experts(post, weights.down):
            second = weights.down, weights.down_bias
            out = launcher(post, *second).expert_linear(post, *second, slots)
        else:  # a hook can have added a gradient
            out = per_expert(lambda e, rows: down(e, post, rows), x.shape[1])
    else:
        tiled = _by_tiles(x, experts, weights)
        out = per_expert(lambda e, rows: down(e, activated(e, rows)), x.shape[1]) if tiled is None else tiled
    out = apply_hook(taps.out, out)
    if (steps := cpu.slot_steps((x, out), gates)) and steps.covers(x.shape[1]):
        return steps.combine(out, gates)
    return chunked(lambda y, g: torch.einsum("tsd,ts->td", y.to(wide), g.to(wide)).to(x.dtype), out, gates, dim=0)


def _by_tiles(
    x: Float[Tensor, "tokens d_model"], experts: Int[Tensor, "tokens slot"], weights: Experts
) -> Float[Tensor, "tokens slot d_model"] | None:
    """Return what every slot's expert makes of its token, or None where not all of it is compiled.

    All threads share the products of a few experts at a time, so that no thread waits for another's last expert.
    """
    first, second, steps = weights.gate_up, weights.down, cpu.slot_steps((x,))
    if not isinstance(first, Mxfp4) or not isinstance(second, Mxfp4):
        return None
    tiles = _tiles(x, first, weights.gate_up_bias) and _tiles(x, second, weights.down_bias)
    if not tiles or not steps or not steps.covers(weights.gate_up_bias.shape[1] // 2):
        return None
    order, counts = group(experts, len(weights.gate_up_bias))
    shares = _shares(counts.tolist())
    most, width = max(rows for _, rows in shares), weights.gate_up_bias.shape[1]
    pairs, posts = x.new_empty(most, width), x.new_empty(most, width // 2)
    out, start = x.new_empty(len(order), x.shape[1]), 0
    for share, rows in shares:
        slots, h, post = order[start : start + rows], pairs[:rows], posts[:rows]
        tiles.write_expert_rows(x, first, weights.gate_up_bias, share, slots // experts.shape[1], None, h)
        steps.swiglu(h, weights.limit, weights.alpha, post)
        tiles.write_expert_rows(post, second, weights.down_bias, share, None, slots, out)
        start += rows
    return out.unflatten(0, experts.shape)


def _shares(counts: list[int]) -> list[tuple[list[tuple[int, int]], int]]:
    """Return experts with their rows, in shares of at most `_SHARE_ROWS` rows or one expert, and the rows of each."""
    shares: list[tuple[list[tuple[int, int]], int]] = []
    for expert, count in enumerate(counts):
        if count and shares and shares[-1][1] + count <= _SHARE_ROWS:
            shares[-1] = [*shares[-1][0], (expert, count)], shares[-1][1] + count
        elif count:
            shares.append(([(expert, count)], count))
    return shares


def _linear(
    x: Float[Tensor, "rows inputs"],
    rows: Int[Tensor, " number"] | None,
    matrix: Mxfp4 | GgmlMxfp4 | LoraWeight | Tensor,
    bias: Float[Tensor, "expert outputs"],
    e: int,
) -> Float[Tensor, "number outputs"]:
    """Return these rows of x, all by default, times expert e's matrix, plus its bias."""
    if isinstance(matrix, Mxfp4 | GgmlMxfp4) and (tiles := _tiles(x, matrix, bias)):
        return tiles.packed_linear(x, matrix.at(e), bias[e], rows)
    own = x if rows is None else x[rows]
    if isinstance(matrix, LoraWeight):
        return _linear(own, None, matrix.base, bias, e) + own @ matrix.a[e].to(x.dtype) @ matrix.b[e].to(x.dtype)
    if isinstance(matrix, GgmlMxfp4):
        return ggml.linear(own, matrix, e) + bias[e]
    return linear(own, matrix.at(e) if isinstance(matrix, Mxfp4) else matrix[e]) + bias[e]
