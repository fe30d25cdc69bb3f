"""The expert kernels against one token, one slot at a time in float64, and against the torch layer tap by tap.

The allowance is twice the error that torch makes in the same precision, and a floor of one rounding of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import moe as reference
from workbench.kernels import routing
from workbench.kernels.gpu.moe import moe
from workbench.kernels.moe import ActivationHooks, Experts
from workbench.kernels.mxfp4 import Mxfp4, dequantise, quantise

FLOOR = {torch.float32: 2e-7, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


class Case(NamedTuple):
    x: Tensor
    experts: Tensor
    gates: Tensor
    weights: Experts
    logits: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Experts]:
        return self.x, self.experts, self.gates, self.weights

    def to(self, dtype: torch.dtype) -> "Case":
        w = self.weights
        weights = w._replace(gate_up_bias=w.gate_up_bias.to(dtype), down_bias=w.down_bias.to(dtype))
        return self._replace(x=self.x.to(dtype), gates=self.gates.to(dtype), weights=weights)


def case(
    tokens: int, num_experts: int, d: int, f: int, k: int, dtype: torch.dtype, experts: Tensor | None = None
) -> Case:
    """Weights large enough that gates and ups reach their clamps."""
    rng = torch.Generator().manual_seed(tokens + f)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    weights = Experts(
        Mxfp4(*quantise(normal(num_experts, 2 * f, d) / 3)),
        2 * normal(num_experts, 2 * f).to(dtype),
        Mxfp4(*quantise(normal(num_experts, d, f) / 8)),
        2 * normal(num_experts, d).to(dtype),
        7.0,
        1.702,
    )
    x, logits = normal(tokens, d).to(dtype), normal(tokens, num_experts)
    chosen = routing.top_k(logits, k) if experts is None else experts
    return Case(x, chosen, routing.gate(logits, chosen), weights, logits)


def halves(w: Experts) -> Experts:
    """Gate and up as the two halves of the rows, read by code that expects them interleaved."""
    rows = torch.arange(w.gate_up_bias.shape[1]).view(2, -1).T.flatten()
    return w._replace(gate_up=Mxfp4(*(t[:, rows] for t in w.gate_up)), gate_up_bias=w.gate_up_bias[:, rows])


def swapped(w: Experts) -> Experts:
    return w._replace(gate_up=w.gate_up._replace(blocks=(w.gate_up.blocks >> 4) | (w.gate_up.blocks << 4)))


def slow(c: Case, fault: str = "") -> Tensor:
    """The layer's output in float64, or what an implementation with a fault would give."""
    x, experts, gates, w = c.to(torch.float64).inputs
    w = {"gate and up in halves": halves, "high nibble first": swapped}.get(fault, lambda w: w)(w)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, g in zip(experts[t].tolist(), gates[t], strict=True):
            h = dequantise(*w.gate_up.at(e), torch.float64) @ x[t] + w.gate_up_bias[e]
            gate, up = h[0::2].clamp(max=w.limit), h[1::2].clamp(-w.limit, w.limit)
            if fault == "gate clamped from below":
                gate = gate.clamp(min=-0.5)
            if fault == "gate not clamped":
                gate = h[0::2]
            if fault == "up not clamped":
                up = h[1::2]
            post = gate * torch.sigmoid(w.alpha * gate) * (up if fault == "no + 1" else up + 1)
            y = dequantise(*w.down.at(e), torch.float64) @ post
            out[t] += y * g + w.down_bias[e] if fault == "bias after the gate" else (y + w.down_bias[e]) * g
    return out


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def close(got: Tensor, want: Tensor, torch_made: Tensor, wrong: Tensor | None = None) -> bool:
    """Whether got is as near to want, or to a wrong answer, as it should be to want."""
    allowed = 2 * distance(torch_made, want) + FLOOR[got.dtype]
    return distance(got, want if wrong is None else wrong) <= allowed


SIZES = [(1, 4, 128, 128, 2), (21, 5, 96, 160, 3), (5, 3, 32, 32, 3)]


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_slow_sum(size: tuple[int, ...], dtype: torch.dtype) -> None:
    c = case(*size, dtype)
    got = moe(*c.inputs)
    assert got.dtype == dtype
    assert close(got, slow(c), reference.moe(*c.inputs))


FAULTS = [
    "gate and up in halves",
    "high nibble first",
    "no + 1",
    "gate clamped from below",
    "gate not clamped",
    "up not clamped",
    "bias after the gate",
]


@dtypes
def test_the_comparison_notices_every_known_fault(dtype: torch.dtype) -> None:
    c = case(*SIZES[1], dtype)
    got, want, torch_made = moe(*c.inputs), slow(c), reference.moe(*c.inputs)
    assert close(got, want, torch_made)
    assert not [fault for fault in FAULTS if close(got, want, torch_made, slow(c, fault))]
    softmax_first = slow(c._replace(gates=c.logits.softmax(-1).gather(-1, c.experts)))
    assert not close(got, want, torch_made, softmax_first)


@pytest.mark.parametrize("experts", [[2, 2], [0, 4]], ids=["all to one", "empty experts"])
def test_experts_that_everybody_and_nobody_chose(experts: list[int]) -> None:
    c = case(20, 5, 64, 96, 2, torch.float32, torch.tensor([experts]).repeat(20, 1))
    assert close(moe(*c.inputs), slow(c), reference.moe(*c.inputs))


def tapped(names: tuple[str, ...], seen: dict[str, Tensor], edit: Callable[[Tensor], Tensor]) -> ActivationHooks:
    def tap(name: str) -> Callable[[Tensor], Tensor]:
        return lambda slots: edit(seen.setdefault(name, slots))

    return ActivationHooks(**{name: tap(name) for name in names})


TAPPED = [*((name,) for name in ActivationHooks._fields), ("gate", "post"), ActivationHooks._fields]


@dtypes
@pytest.mark.parametrize("names", TAPPED, ids=str)
def test_taps_see_what_torch_sees_and_change_what_it_changes(names: tuple[str, ...], dtype: torch.dtype) -> None:
    c = case(*SIZES[1], dtype)
    seen: dict[str, Tensor] = {}
    assert torch.equal(moe(*c.inputs, tapped(names, seen, lambda t: t)), moe(*c.inputs)), "looking changes nothing"
    there: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    reference.moe(*c.inputs, tapped(names, there, lambda t: t))
    reference.moe(*c.to(torch.float64).inputs, tapped(names, exact, lambda t: t))
    assert seen.keys() == set(names)
    assert all(close(seen[name], exact[name], there[name]) for name in names)
    half = [
        f(*a.inputs, tapped(names, {}, lambda t: t * 0.5))
        for f, a in ((moe, c), (reference.moe, c.to(torch.float64)), (reference.moe, c))
    ]
    assert close(*half)
    assert not close(half[0], half[1], half[2], slow(c))


def gradients(layer: Callable[..., Tensor], c: Case, toward: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Of (layer · toward) with respect to x, gates and the tapped stages, which a tap bends."""
    seen: dict[str, Tensor] = {}

    def bent(stage: Tensor) -> Tensor:
        stage.retain_grad()
        return stage + stage.tanh()

    x, gates = c.x.clone().requires_grad_(), c.gates.clone().requires_grad_()
    out = layer(x, c.experts, gates, c.weights, tapped(names, seen, bent) if names else None)
    out.backward(toward.to(out.dtype))
    grads = {"x": x.grad, "gates": gates.grad} | {name: stage.grad for name, stage in seen.items()}
    return {name: grad for name, grad in grads.items() if grad is not None}


@dtypes
@pytest.mark.parametrize("names", [(), ("gate",), ("post",), ("out",), ActivationHooks._fields], ids=str)
def test_gradients_equal_float64_autograd_of_torch(names: tuple[str, ...], dtype: torch.dtype) -> None:
    c = case(*SIZES[1], dtype)
    toward = torch.randn(c.x.shape, generator=torch.Generator().manual_seed(9))
    got = gradients(moe, c, toward, names)
    want = gradients(reference.moe, c.to(torch.float64), toward, names)
    torch_made = gradients(reference.moe, c, toward, names)
    assert got.keys() == want.keys() == {"x", "gates", *names}
    for name, grad in got.items():
        assert close(grad, want[name], torch_made[name]), f"{name}: {distance(grad, want[name])}"
    other = gradients(reference.moe, c._replace(gates=c.gates.flip(-1)).to(torch.float64), toward, names)
    assert not close(got["x"], want["x"], torch_made["x"], other["x"])


def test_the_answer_and_the_gradient_are_the_same_every_time() -> None:
    c = case(*SIZES[1], torch.bfloat16)
    first, second = (gradients(moe, c, c.x, ()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    c = case(*SIZES[2], torch.float32)
    with pytest.raises(TypeError, match=r"bfloat16 or float32, got torch\.float16"):
        moe(c.x.half(), c.experts, c.gates, c.weights)
    with pytest.raises(TypeError, match="packed matrices, got Tensor"):
        moe(*c.inputs[:3], c.weights._replace(down=dequantise(*c.weights.down).mT))


@pytest.mark.parametrize("matrix", ["gate_up", "down"])
def test_a_nan_scale_shows(matrix: str) -> None:
    """Clamps included: a NaN is not a large gate."""
    c = case(*SIZES[2], torch.float32)
    getattr(c.weights, matrix).scales[1, 3] = 255
    hit = (c.experts == 1).any(-1)
    assert torch.equal(moe(*c.inputs)[:, 3].isnan(), hit)
