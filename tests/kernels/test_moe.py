"""The grouped expert layer against one token, one slot at a time in float64."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu
from workbench.kernels.moe import ActivationHooks, Experts, moe
from workbench.kernels.mxfp4 import Mxfp4, dequantise, quantise
from workbench.kernels.routing import gate, group, top_k

E, D, F = 5, 64, 96


def weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> Experts:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float32)

    return Experts(
        Mxfp4(*quantise(normal(E, 2 * F, D))),
        normal(E, 2 * F).to(dtype),
        Mxfp4(*quantise(normal(E, D, F) / 4)),
        normal(E, D).to(dtype),
        7.0,
        1.702,
    )


def slow(x: Tensor, experts: Tensor, gates: Tensor, w: Experts) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        for e, g in zip(experts[t].tolist(), gates[t].tolist(), strict=True):
            h = dequantise(*w.gate_up.at(e), torch.float64) @ x[t].double() + w.gate_up_bias[e].double()
            a, b = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
            y = dequantise(*w.down.at(e), torch.float64) @ (a / (1 + torch.exp(-1.702 * a)) * (b + 1))
            out[t] += g * (y + w.down_bias[e].double())
    return out


@pytest.mark.parametrize("tokens", [1, 63])
def test_equals_the_slow_sum(tokens: int) -> None:
    w = weights()
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    experts = top_k(logits, 3)
    torch.testing.assert_close(moe(x, experts, gate(logits, experts), w), slow(x, experts, gate(logits, experts), w))


def test_short_prompts_multiply_by_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an expert has at most 24 rows on average; a product with another expert's matrix is noticed."""
    if cpu.unavailable():
        pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}")
    from workbench.kernels.cpu import products

    calls: list[Tensor] = []
    expert_linear = products.expert_linear
    monkeypatch.setattr(products, "expert_linear", lambda x, *rest: calls.append(x) or expert_linear(x, *rest))

    def compute(tokens: int, shift: int = 0) -> tuple[Tensor, Tensor]:
        w = weights(dtype=torch.float32)
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
        logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(2))
        experts = top_k(logits, 3)
        gates = gate(logits, experts)
        return moe(x, (experts + shift) % E, gates, w), slow(x, experts, gates, w).float()

    torch.testing.assert_close(*compute(40), atol=1e-4, rtol=1e-4)  # 24 rows an expert
    assert len(calls) == 2
    got, want = compute(40, shift=1)
    assert (got - want).norm() > 0.1 * want.norm()
    calls.clear()
    torch.testing.assert_close(*compute(41), atol=1e-4, rtol=1e-4)
    assert not calls


def test_an_expert_nobody_chose_and_one_everybody_chose() -> None:
    w = weights()
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    experts = torch.tensor([[4, 1]]).expand(20, 2)
    gates = torch.full((20, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(moe(x, experts, gates, w), slow(x, experts, gates, w))


def test_taps_see_and_change_every_stage_in_slot_order() -> None:
    w = weights()
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.randn(9, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    experts = top_k(logits, 3)
    gates = gate(logits, experts)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return lambda t: seen.setdefault(name, t)

    same = moe(x, experts, gates, w, ActivationHooks(*(keep(n) for n in ("gate", "up", "post", "out"))))  # type: ignore[arg-type]
    assert torch.equal(same, moe(x, experts, gates, w))
    h = dequantise(*w.gate_up.at(int(experts[4, 1])), torch.float64) @ x[4] + w.gate_up_bias[experts[4, 1]]
    torch.testing.assert_close(seen["gate"][4, 1], h[0::2])
    torch.testing.assert_close(seen["up"][4, 1], h[1::2])
    torch.testing.assert_close((seen["out"] * gates[..., None]).sum(1), same)
    silent = moe(x, experts, gates, w, ActivationHooks(post=torch.zeros_like))
    torch.testing.assert_close(silent, (w.down_bias[experts] * gates[..., None]).sum(1))
    for name in ActivationHooks._fields:
        assert torch.equal(moe(x, experts, gates, w, ActivationHooks(**{name: lambda t: t})), same), f"{name} alone"
        assert not torch.equal(moe(x, experts, gates, w, ActivationHooks(**{name: lambda t: t + 1})), same), (
            f"{name} alone"
        )


def test_gates_are_a_softmax_over_the_chosen_only_and_ties_go_to_the_smaller_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert top_k(logits, 2).tolist() == [[1, 2]]
    torch.testing.assert_close(gate(logits, torch.tensor([[1, 0]])), torch.tensor([[3.0, 1.0]]).softmax(-1))


def test_grouping_is_a_permutation_by_expert() -> None:
    experts = torch.tensor([[3, 0], [3, 1], [0, 3]])
    order, counts = group(experts, 5)
    assert experts.flatten()[order].tolist() == [0, 0, 1, 3, 3, 3]
    assert counts.tolist() == [2, 1, 0, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_error_is_within_twice_that_of_dense_torch(dtype: torch.dtype) -> None:
    w = weights(dtype=dtype)
    dense = w._replace(
        gate_up=dequantise(*w.gate_up, dtype).mT.contiguous(), down=dequantise(*w.down, dtype).mT.contiguous()
    )
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = torch.randn(50, E, generator=torch.Generator().manual_seed(2))
    experts = top_k(logits, 3)
    gates = gate(logits, experts)
    truth = slow(x, experts, gates, w)
    error, baseline = ((moe(x, experts, gates, m).double() - truth).norm() / truth.norm() for m in (w, dense))
    assert error <= 2 * baseline + 1e-7


def test_experts_side_by_side_are_the_experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    w = weights()
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.randn(40, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    experts = top_k(logits, 3)
    with torch.no_grad():
        torch.set_num_threads(1)
        alone = moe(x, experts, gate(logits, experts), w)
        torch.set_num_threads(3)
        monkeypatch.setattr("workbench.kernels.moe._LIGHT", 0)
        assert torch.equal(moe(x, experts, gate(logits, experts), w), alone)
        assert torch.get_num_threads() == 3, "the pool must leave the caller's threads as they are"
    torch.set_num_threads(threads)


def test_a_long_prompt_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights()
    x = torch.randn(21, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.randn(21, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    experts = top_k(logits, 3)
    complete = moe(x, experts, gate(logits, experts), w)
    monkeypatch.setattr("workbench.kernels.moe._TOKENS", 8)
    torch.testing.assert_close(moe(x, experts, gate(logits, experts), w), complete)
