"""Gradients of every hook point are those of finite differences, through packed weights and in every path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from tests.model.live_memory import LiveBytes
from workbench.hooks.names import hook_points
from workbench.kernels import mxfp4
from workbench.model.layers import ExpertMatrix
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (2, 12), generator=torch.Generator().manual_seed(6))
POINTS = [name for name in hook_points(BASE.n_layers) if not name.endswith("hook_expert_indices")]
WEIGHT = torch.randn(BASE.d_vocab, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
Edit = Callable[[Tensor, Any], Tensor]


def packed(model: GptOss) -> GptOss:
    """Its experts in MXFP4."""
    for block in model.blocks:
        for name in ("gate_up", "down"):
            old = getattr(block.mlp.experts, name)
            n, inputs, outputs = old.weight.shape
            new = ExpertMatrix(n, inputs, outputs, packed=True)
            new.blocks, new.scales = mxfp4.quantise(old.weight.detach().mT.contiguous().float())
            new.bias = old.bias
            setattr(block.mlp.experts, name, new)
    return model


def dense(model: GptOss) -> GptOss:
    """The same numbers, unpacked."""
    for block in model.blocks:
        for name in ("gate_up", "down"):
            old = getattr(block.mlp.experts, name)
            values = mxfp4.dequantise(old.blocks, old.scales).mT.to(old.bias.dtype)
            new = ExpertMatrix(*values.shape, packed=False)
            new.weight, new.bias = torch.nn.Parameter(values.contiguous()), old.bias
            setattr(block.mlp.experts, name, new)
    return model


@pytest.fixture(scope="module")
def model() -> GptOss:
    return packed(random_model(BASE)).double().requires_grad_(False)


def loss(logits: Tensor) -> Tensor:
    """Curved, and of every position."""
    return (logits.to(WEIGHT.dtype) * WEIGHT).sum(-1).tanh().sum() + logits.to(WEIGHT.dtype).logsumexp(-1).sum()


def at(model: GptOss, name: str, delta: Tensor | None, **options: Any) -> Tensor:
    """The loss with `delta` added at a hook point."""

    def add(x: Tensor, hook: Any) -> Tensor:
        return x if delta is None else x + delta.to(x.dtype)

    tokens = options.pop("tokens", X)
    return loss(model.run_with_hooks(tokens, fwd_hooks=[(name, add)], **options))


def loss_and_routes(model: GptOss, name: str, delta: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss with `delta` added at a hook point, and the experts that every layer chose in the same pass."""
    seen: list[Tensor] = []
    looks = [(f"blocks.{i}.mlp.hook_expert_indices", lambda x, hook: seen.append(x)) for i in range(BASE.n_layers)]
    with model.hooks(fwd_hooks=looks):  # type: ignore[arg-type]
        return at(model, name, delta), seen


def shape_of(model: GptOss, name: str, **options: Any) -> Tensor:
    activations: list[Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(
            options.pop("tokens", X), fwd_hooks=[(name, lambda x, hook: activations.append(x))], **options
        )
    return activations[0]


@pytest.mark.parametrize("name", POINTS)
def test_the_gradient_is_the_finite_difference(model: GptOss, name: str) -> None:
    like = shape_of(model, name)
    rng = torch.Generator().manual_seed(11)
    delta = torch.zeros(like.shape, dtype=torch.float64, requires_grad=True)
    at(model, name, delta).backward()
    assert delta.grad is not None
    checked = 0
    for _ in range(6):
        way = torch.randn(like.shape, generator=rng, dtype=torch.float64) * like.double().nan_to_num(
            0, 0, 0
        ).abs().clamp(0.1, 1)
        step = 1e-6
        with torch.no_grad():
            (before, experts_before), (after, experts_after) = (
                loss_and_routes(model, name, sign * step * way) for sign in (-1, 1)
            )
            if any(not torch.equal(a, b) for a, b in zip(experts_before, experts_after, strict=True)):
                continue  # a choice of experts flips: the loss jumps there, and has no derivative
            slope = (after - before) / (2 * step)
        got = (delta.grad * way).sum()
        torch.testing.assert_close(got, slope, rtol=2e-5, atol=1e-5)
        checked += 1
        if checked == 3:
            break
    assert checked == 3
    assert float(delta.grad.abs().sum()) > 0


BROKEN: dict[str, tuple[str, Callable[[GptOss, pytest.MonkeyPatch], None]]] = {
    "a clamp that lets gradients through": (
        "blocks.1.mlp.experts.hook_gate",
        lambda model, patch: patch.setattr(
            "workbench.kernels.moe.swiglu",
            lambda gate, up, limit, alpha: (
                _straight(gate, limit) * torch.sigmoid(alpha * _straight(gate, limit)) * (up.clamp(-limit, limit) + 1)
            ),
        ),
    ),
    "gates without gradients": (
        "blocks.1.ln2.hook_normalized",
        lambda model, patch: patch.setattr(
            "workbench.kernels.routing.gate", lambda logits, experts: logits.gather(-1, experts).softmax(-1).detach()
        ),
    ),
    "a sink without gradients": (
        "blocks.1.attn.hook_rot_q",
        lambda model, patch: patch.setattr(
            "workbench.kernels.attention.shrink", lambda z, sink: (z * (1 - sink.detach())[..., None]).to(z.dtype)
        ),
    ),
}


def _straight(gate: Tensor, limit: float) -> Tensor:
    return gate + (gate.clamp(max=limit) - gate).detach()


@pytest.mark.parametrize("twin", BROKEN)
def test_a_broken_backward_is_seen(model: GptOss, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, breaks = BROKEN[twin]
    model.add_hook("blocks.1.attn.hook_sink", lambda x, hook: x)  # with a hook on the sink
    try:
        test_the_gradient_is_the_finite_difference(model, name)
        breaks(model, monkeypatch)
        with pytest.raises(AssertionError):
            test_the_gradient_is_the_finite_difference(model, name)
    finally:
        model.reset_hooks()


def gradient(model: GptOss, name: str, **options: Any) -> Tensor:
    like = shape_of(model, name, **options)
    delta = torch.zeros_like(like, requires_grad=True)
    at(model, name, delta, **options).backward()
    assert delta.grad is not None
    return delta.grad


SOME = (
    "hook_embed",
    "blocks.0.attn.hook_z",
    "blocks.1.hook_resid_mid",
    "blocks.1.mlp.experts.hook_post",
    "blocks.2.attn.hook_k",
)


@pytest.mark.parametrize("name", SOME)
def test_packed_and_padded_sequences_have_the_gradients_of_each_alone(model: GptOss, name: str) -> None:
    lengths = [12, 5]
    rows = [X[:1], X[1:, :5]]
    alone = [gradient(model, name, tokens=row) for row in rows]
    together = gradient(model, name, tokens=torch.cat(rows, 1), packed=lengths)
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-6, atol=1e-8)
    like = shape_of(model, name)
    delta = torch.zeros_like(like, requires_grad=True)
    logits = model.run_with_hooks(X, fwd_hooks=[(name, lambda x, hook: x + delta)], n_real=lengths)
    (loss(logits[:1]) + loss(logits[1:, :5])).backward()
    assert delta.grad is not None
    torch.testing.assert_close(delta.grad[:1], alone[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(delta.grad[1:, :5], alone[1], rtol=1e-6, atol=1e-8)
    assert not delta.grad[1:, 5:].any(), "padding has a gradient"


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_no_worse_than_dense_ones(name: str, dtype: torch.dtype) -> None:
    """Both against float64; a choice of experts that rounding flips would hide everything, so it is held."""
    exact = packed(random_model(BASE)).double().requires_grad_(False)
    held = [(n, t) for n, t in exact.run_with_cache(X)[1].items() if n.endswith("hook_expert_indices")]

    def errors(twin: GptOss) -> float:
        hold = [(n, lambda x, hook, t=t: t) for n, t in held]
        with twin.hooks(fwd_hooks=hold):
            got = gradient(twin, name).double()
        return float((got - want).norm() / want.norm())

    with exact.hooks(fwd_hooks=[(n, lambda x, hook, t=t: t) for n, t in held]):
        want = gradient(exact, name)
    ours = errors(packed(random_model(BASE)).to(dtype).requires_grad_(False))
    theirs = errors(dense(packed(random_model(BASE))).to(dtype).requires_grad_(False))
    assert ours <= 2 * theirs + 1e-6
    assert theirs < 0.2


def test_transformer_lens_backward_hooks_and_caches(model: GptOss) -> None:
    seen: dict[str, Tensor] = {}
    name = "blocks.1.hook_resid_mid"
    with model.hooks(bwd_hooks=[(name, lambda g, hook: seen.update(g=g))]):
        start = torch.zeros(*X.shape, BASE.d_model, dtype=torch.float64, requires_grad=True)
        at(model, "hook_embed", start).backward()
    torch.testing.assert_close(seen["g"], gradient(model, name))

    def run(tokens: Tensor) -> Tensor:
        return loss(GptOss.forward(model, tokens))

    model.embed.weight.requires_grad_(True)
    try:
        model.forward = run  # type: ignore[method-assign, assignment]
        _, cache = model.run_with_cache(X, incl_bwd=True, names_filter=name)
    finally:
        del model.forward
        model.embed.weight.requires_grad_(False)
        model.zero_grad()
    torch.testing.assert_close(cache[f"{name}_grad"], gradient(model, name))


def test_a_forward_pass_with_gradients_keeps_no_unpacked_expert() -> None:
    model = packed(random_model(BASE)).requires_grad_(False)
    start = torch.zeros(1, 6, BASE.d_model, requires_grad=True)
    weights = BASE.num_experts * 3 * BASE.d_model * BASE.d_mlp * 4 * BASE.n_layers
    with LiveBytes(model.state_dict().values()) as counted:
        out = loss(model.run_with_hooks(X[:1, :6], fwd_hooks=[("hook_embed", lambda x, hook: x + start)]))
        held = counted.live
    out.backward()
    assert held < weights / 4, (held, weights)
