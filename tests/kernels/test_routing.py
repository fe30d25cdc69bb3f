"""Reference routing: ties go to the smaller id, gates are a softmax over the chosen logits alone, groups are sorted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.kernels.routing import gate, group, top_k


def test_ties_go_to_the_smaller_expert() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_k(logits, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(logits, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_gates_are_a_softmax_over_the_chosen_experts() -> None:
    logits = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    experts = top_k(logits, 4)
    gates = gate(logits, experts)
    chosen = logits.gather(1, experts).exp()
    torch.testing.assert_close(gates, chosen / chosen.sum(1, keepdim=True))
    over_all = logits.softmax(1).gather(1, experts)  # negative control: another model
    assert not torch.allclose(gates, over_all)


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=20))
def test_slots_are_grouped_by_expert_in_their_order(rows: list[list[int]]) -> None:
    experts = torch.tensor(rows)
    order, counts = group(experts, 6)
    flat = experts.flatten().tolist()
    assert order.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert counts.tolist() == [flat.count(expert) for expert in range(6)]
