"""Every kernel on problems of a model's own shape: its launch, torch's result, and the bytes that it moves.

Inputs are random and always the same. References run on the CPU, where `workbench.kernels` is plain torch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels import attention as torch_attention
from workbench.kernels import logits as torch_logits
from workbench.kernels import moe as torch_moe
from workbench.kernels import moments as torch_moments
from workbench.kernels import mxfp4 as torch_mxfp4
from workbench.kernels import norm as torch_norm
from workbench.kernels import rotary as torch_rotary
from workbench.kernels import routing as torch_routing
from workbench.kernels.gpu import attention, moe, moments, mxfp4, norm, rotary, routing
from workbench.kernels.gpu import logits as logit_kernels
from workbench.kernels.moe import Experts
from workbench.kernels.mxfp4 import GROUP, Mxfp4
from workbench.model.config import Config
from workbench.model.rope import cos_sin

Results = tuple[Tensor, ...]
_BYTES = 2  # of a bfloat16
_LOGIT_ROWS = 64  # of the whole vocabulary, which the reference holds in float64


@dataclass(frozen=True)
class Case:
    """A kernel on one problem; bytes and flops are what any implementation must move and multiply."""

    kernel: str
    problem: str
    launch: Callable[[], Results]
    reference: Callable[[torch.dtype], Results]
    bytes: float
    flops: float = 0.0
    rounding: float = 2.0  # times the error of torch in bfloat16 is allowed


class Layer:
    """One layer's weights and the inputs it gets, drawn on the device."""

    def __init__(self, cfg: Config, device: torch.device, seed: int = 0) -> None:
        self.cfg, self.device = cfg, device
        self._rng = torch.Generator(device).manual_seed(seed)
        e, d, f = cfg.num_experts, cfg.d_model, cfg.d_mlp
        self.gate_up, self.down = self.packed(e, 2 * f, d), self.packed(e, d, f)
        self.experts = Experts(
            self.gate_up, self.normal(e, 2 * f), self.down, self.normal(e, d), cfg.swiglu_limit, cfg.swiglu_alpha
        )
        self.sinks = self.normal(cfg.n_heads) + 2

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self._rng, device=self.device, dtype=torch.float32).to(dtype)

    def packed(self, experts: int, rows: int, columns: int) -> Mxfp4:
        """Return random packed matrices. Codes have an r.m.s. of 2.9; scales bring a product's outputs to 2."""
        shape = (experts, rows, columns // GROUP)
        middle = 127 + round(math.log2(2 / 2.9 / math.sqrt(columns)))

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=self._rng, device=self.device, dtype=torch.uint8)

        return Mxfp4(draw(0, 256, *shape, 16), draw(middle - 1, middle + 2, *shape))

    def routed(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return experts and gates of random router logits."""
        logits = self.normal(tokens, self.cfg.num_experts, dtype=torch.float32)
        gates, experts = logits.topk(self.cfg.experts_per_token)
        return experts, gates.softmax(-1)

    @property
    def expert_bytes(self) -> float:
        """Return the bytes of one expert's packed matrices."""
        return 3 * self.cfg.d_model * self.cfg.d_mlp * (16 + 1) / GROUP


def cases(layer: Layer, tokens: int, batches: tuple[int, ...], past: int) -> Iterator[Case]:
    """Yield every kernel on a prefill of `tokens`, and those of decoding `batches` rows after `past` tokens."""
    prefill = f"prefill of {tokens:,}"
    yield _dequantise(layer)
    yield from _routing(layer, tokens, prefill)
    yield _moe(layer, tokens, prefill)
    yield _moe_backward(layer, tokens, prefill)
    for batch in batches:
        yield _moe(layer, batch, f"decode of {batch}")
    for window in dict.fromkeys(layer.cfg.windows):
        seen = "full" if window is None else f"window {window}"
        yield _attention(layer, 1, tokens, 0, window, f"{prefill}, {seen}")
        yield _attention(layer, 1, tokens, 0, window, f"{prefill}, {seen}", backward=True)
        for batch in batches:
            yield _attention(layer, batch, 1, past, window, f"decode of {batch} after {past:,}, {seen}")
    yield _moments(layer, tokens, prefill)
    yield _norm(layer, tokens, prefill)
    yield _rotary(layer, tokens, prefill)
    yield _logits(layer, min(tokens, _LOGIT_ROWS))


def _dequantise(layer: Layer) -> Case:
    one = layer.gate_up.at(0)
    groups = one.scales.numel()
    return Case(
        "mxfp4.dequantise",
        "one gate and up matrix",
        lambda: (mxfp4.dequantise(one.blocks, one.scales),),
        lambda dtype: (torch_mxfp4.dequantise(one.blocks.cpu(), one.scales.cpu(), dtype),),
        groups * (17 + 32 * _BYTES),
    )


def _routing(layer: Layer, tokens: int, problem: str) -> Iterator[Case]:
    e, k = layer.cfg.num_experts, layer.cfg.experts_per_token
    logits, experts = layer.normal(tokens, e, dtype=torch.float32), layer.routed(tokens)[0]

    def group() -> Results:
        groups = routing.group(experts, e)
        return groups.order, groups.counts

    yield Case(
        "routing.top_k",
        problem,
        lambda: (routing.top_k(logits, k),),
        lambda dtype: (torch_routing.top_k(logits.cpu(), k),),
        tokens * (4 * e + 8 * k),
    )
    yield Case(
        "routing.gate",
        problem,
        lambda: (routing.gate(logits, experts),),
        lambda dtype: (torch_routing.gate(logits.cpu().to(dtype), experts.cpu()),),
        tokens * k * 16,
    )
    yield Case(
        "routing.group", problem, group, lambda dtype: torch_routing.group(experts.cpu(), e), tokens * k * (8 + 4)
    )


def _moe(layer: Layer, tokens: int, problem: str) -> Case:
    x, (experts, gates), cfg = layer.normal(tokens, layer.cfg.d_model), layer.routed(tokens), layer.cfg

    def reference(dtype: torch.dtype) -> Results:
        x_, ids, gates_ = _on_cpu(dtype, x, experts, gates)
        return (torch_moe.moe(x_, ids, gates_, _experts(layer, dtype)),)

    return Case(
        "moe",
        problem,
        lambda: (moe.moe(x, experts, gates, layer.experts),),
        reference,
        len(experts.unique()) * layer.expert_bytes + 2 * tokens * cfg.d_model * _BYTES,
        6 * tokens * cfg.experts_per_token * cfg.d_model * cfg.d_mlp,
    )


def _moe_backward(layer: Layer, tokens: int, problem: str) -> Case:
    """Forward and backward together: 6 and 10 flops a weight and slot, 3 and 5 readings of the matrices."""
    x, (experts, gates), cfg = layer.normal(tokens, layer.cfg.d_model), layer.routed(tokens), layer.cfg
    grad = layer.normal(tokens, cfg.d_model)

    def reference(dtype: torch.dtype) -> Results:
        x_, ids, gates_, grad_ = _on_cpu(dtype, x, experts, gates, grad)
        return _gradients(lambda x, g: torch_moe.moe(x, ids, g, _experts(layer, dtype)), grad_, x_, gates_)

    return Case(
        "moe, with gradient",
        problem,
        lambda: _gradients(lambda x, g: moe.moe(x, experts, g, layer.experts), grad, x, gates),
        reference,
        8 / 3 * len(experts.unique()) * layer.expert_bytes + 4 * tokens * cfg.d_model * _BYTES,
        16 * tokens * cfg.experts_per_token * cfg.d_model * cfg.d_mlp,
        4.0,  # torch's gradient keeps more in float32
    )


def _attention(
    layer: Layer, batch: int, new: int, past: int, window: int | None, problem: str, *, backward: bool = False
) -> Case:
    """`new` queries a row that follow `past` keys. With its gradient: 4 flops a pair forward, and 10 backward."""
    cfg, keys = layer.cfg, past + new
    q, grad = (layer.normal(batch, new, cfg.n_heads, cfg.d_head) for _ in range(2))
    k, v = (layer.normal(batch, keys, cfg.n_key_value_heads, cfg.d_head) for _ in range(2))
    positions = torch.arange(past, keys, device=layer.device).expand(batch, new)
    reach = keys if window is None else window
    pairs = batch * sum(min(t + 1, reach) for t in range(past, keys))
    read = batch * min(keys, new + reach - 1) * 2 * cfg.n_key_value_heads + 2 * q[..., 0].numel()

    def forward(kernel: Callable[..., tuple[Tensor, Tensor, Tensor | None]], *tensors: Tensor) -> Results:
        *qkv, at, sinks = tensors
        z, lse, sink = kernel(*qkv, at, window, sinks=sinks)
        assert sink is not None
        return z, lse, sink

    def launch() -> Results:
        if not backward:
            return forward(attention.attention, q, k, v, positions, layer.sinks)
        return _gradients(lambda *qkv: forward(attention.attention, *qkv, positions, layer.sinks)[0], grad, q, k, v)

    def reference(dtype: torch.dtype) -> Results:
        *qkv, at, sinks, grad_ = _on_cpu(dtype, q, k, v, positions, layer.sinks, grad)
        if not backward:
            return forward(torch_attention.attention, *qkv, at, sinks)
        return _gradients(lambda *qkv: forward(torch_attention.attention, *qkv, at, sinks)[0], grad_, *qkv)

    return Case(
        "attention, with gradient" if backward else "attention",
        problem,
        launch,
        reference,
        (3 if backward else 1) * read * cfg.d_head * _BYTES,
        (14 if backward else 4) * pairs * cfg.n_heads * cfg.d_head,
        # Flash attention's gradient subtracts the output times its gradient, where the output has been rounded: of
        # rows with few keys little is left. On an H100 the worst of 431 rows was 1 to 5 times as far off as torch.
        10.0 if backward else 2.0,
    )


def _moments(layer: Layer, tokens: int, problem: str) -> Case:
    x, labels = layer.normal(tokens, layer.cfg.d_model), torch.arange(tokens, device=layer.device) * 7 % 64
    return Case(
        "moments",
        f"{problem}, 64 labels",
        lambda: tuple(moments.moments(x, labels, 64)),
        lambda dtype: tuple(torch_moments.moments(x.cpu().to(dtype), labels.cpu(), 64)),
        tokens * (layer.cfg.d_model * _BYTES + 8) + 64 * layer.cfg.d_model * 8,
    )


def _norm(layer: Layer, tokens: int, problem: str) -> Case:
    x, weight, eps = layer.normal(tokens, layer.cfg.d_model), layer.normal(layer.cfg.d_model), layer.cfg.eps
    return Case(
        "norm.rms_norm",
        problem,
        lambda: (norm.rms_norm(x, weight, eps),),
        lambda dtype: (torch_norm.rms_norm(x.cpu().to(dtype), weight.cpu().to(dtype), eps),),
        2.0 * x.numel() * _BYTES,
    )


def _rotary(layer: Layer, tokens: int, problem: str) -> Case:
    cfg = layer.cfg
    q = layer.normal(1, tokens, cfg.n_heads, cfg.d_head)
    cos, sin = cos_sin(cfg.rope, cfg.d_head, torch.arange(tokens, device=layer.device)[None])
    return Case(
        "rotary.rotate",
        problem,
        lambda: (rotary.rotate(q, cos, sin),),
        lambda dtype: (torch_rotary.rotate(q.cpu().to(dtype), cos.cpu(), sin.cpu()),),
        2.0 * q.numel() * _BYTES + 4.0 * (cos.numel() + sin.numel()),
    )


def _logits(layer: Layer, rows: int) -> Case:
    logits, chosen = layer.normal(rows, layer.cfg.d_vocab), torch.arange(rows, device=layer.device)
    return Case(
        "logits.predict",
        f"{rows} rows",
        lambda: tuple(logit_kernels.predict(logits, chosen)),
        lambda dtype: tuple(torch_logits.predict(logits.cpu().to(dtype), chosen.cpu())),
        float(logits.numel() * _BYTES),
    )


def _gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Results:
    """Of every input, under `grad` on the output."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)


def _on_cpu(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t.cpu().to(dtype if t.is_floating_point() else t.dtype) for t in tensors]


def _experts(layer: Layer, dtype: torch.dtype) -> Experts:
    """Return the layer's weights on the CPU, biases in `dtype`."""
    up, down = (Mxfp4(m.blocks.cpu(), m.scales.cpu()) for m in (layer.gate_up, layer.down))
    biases = _on_cpu(dtype, layer.experts.gate_up_bias, layer.experts.down_bias)
    return layer.experts._replace(gate_up=up, gate_up_bias=biases[0], down=down, down_bias=biases[1])


def row_error(got: Tensor, want: Tensor) -> float:
    """Return the worst row's distance from what was wanted, relative to that row; infinite where integers differ.

    A row of a tenth of the usual size or less counts as that large. NaN is an infinite error.
    """
    if not want.is_floating_point():
        return 0.0 if torch.equal(got.cpu().to(want.dtype), want) else math.inf
    want = want.double().reshape(-1, want.shape[-1])
    off = (got.cpu().double().reshape(want.shape) - want).norm(dim=-1)
    size = want.norm(dim=-1)
    error = (off / size.clamp(min=0.1 * float(size.square().mean().sqrt()) + 1e-300)).max()
    return math.inf if error.isnan() else float(error)


def compare(case: Case) -> tuple[float, float]:
    """Return the largest error of a row, and the allowed one: a multiple of torch's in bfloat16, and a minimum."""
    got, want, torch_bf16 = case.launch(), case.reference(torch.float64), case.reference(torch.bfloat16)
    worst = (0.0, 1.0)
    for g, w, t in zip(got, want, torch_bf16, strict=True):
        allowed = case.rounding * row_error(t, w) + (2**-9 if g.dtype == torch.bfloat16 else 1e-5)
        worst = max(worst, (row_error(g, w), allowed), key=lambda pair: pair[0] / pair[1])
    return worst
