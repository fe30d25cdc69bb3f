"""Phases of a layer against float64, each with a broken implementation that the comparison rejects.

The loops are those of `workbench.kernels.cpu.attention_loops` and `workbench.kernels.cpu.expert_loops`.
"""

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import layer, layer_records, piece_loops, row_loops

HALF_ULP = 2.0**-8  # of bfloat16, relative


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def slow_attention(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One row and head at a time; the sink is one more key without a value."""
    z, lse = torch.zeros_like(q, dtype=torch.float64), torch.zeros(q.shape[:3], dtype=torch.float64)
    for row, head in ((row, head) for row in range(len(q)) for head in range(q.shape[2])):
        last, kv = int(columns[row, 0]), head // (q.shape[2] // k.shape[2])
        keys = slice(0 if window is None else max(0, last - window + 1), last + 1)
        scores = k[row, keys, kv].double() @ q[row, 0, head].double() / q.shape[-1] ** 0.5
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        lse[row, 0, head] = scores.logsumexp(0)
        z[row, 0, head] = scores.softmax(0)[: keys.stop - keys.start] @ v[row, keys, kv].double()
    return z, lse


# Four and one head that read a key together, blocks of keys that are full and not, windows of one key and of several.
@pytest.mark.parametrize(("heads", "kv", "width"), [(8, 2, 64), (6, 2, 32), (3, 3, 16)])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_attention_of_one_query(heads: int, kv: int, width: int, window: int | None) -> None:
    q, k, v = normal(0, 3, 1, heads, width) * 3, normal(1, 3, 301, kv, width), normal(2, 3, 301, kv, width)
    columns, sinks = torch.tensor([[0], [130], [300]]), normal(3, heads)
    for given in (sinks, None):
        z, lse, p = layer.attention(q, k, v, columns, window, given)
        want_z, want_lse = slow_attention(q, k, v, columns, window, given)
        assert error(z, want_z) < 2 * HALF_ULP
        assert error(lse, want_lse) < 1e-6
        if p is not None:
            assert error(p, (sinks.double() - want_lse).exp()) < 1e-5
    broken = (
        slow_attention(q, k, v, columns, window, sinks + 3),
        slow_attention(q, k, v, (columns - 1).abs(), window, sinks),
        slow_attention(q, k, v.roll(1, 3), columns, window, sinks),
    )
    z, _, _ = layer.attention(q, k, v, columns, window, sinks)
    assert min(error(z, want) for want, _ in broken) > 3 * HALF_ULP


def test_keys_out_of_reach_and_nan() -> None:
    """What lies beyond a row's last key is not read; NaN that is seen reaches the head that sees it and no other."""
    q, k, v = normal(0, 1, 1, 4, 16), normal(1, 1, 40, 2, 16), normal(2, 1, 40, 2, 16)
    columns, sinks = torch.tensor([[20]]), normal(3, 4)
    want = layer.attention(q, k, v, columns, None, sinks)[0]
    k[:, 21:], v[:, 21:] = torch.nan, torch.nan
    assert torch.equal(layer.attention(q, k, v, columns, None, sinks)[0], want)
    k[0, 7, 1, 3] = torch.nan
    got = layer.attention(q, k, v, columns, None, sinks)[0]
    assert got[0, 0, 2:].isnan().all()
    assert torch.equal(got[0, 0, :2], want[0, 0, :2])


def test_gates_are_a_softmax_over_the_chosen_logits() -> None:
    logits = normal(0, 5, 8).float()
    experts = torch.tensor([[1, 5, 0], [2, 2, 7], [7, 6, 5], [0, 1, 2], [3, 4, 5]])
    want = logits.double().gather(1, experts).softmax(-1)
    assert error(layer.gate(logits, experts), want) < 1e-6
    assert error(layer.gate(logits, experts.flip(1)), want) > 1e-2


def test_sizes_that_the_loops_cannot_compute_are_refused() -> None:
    sizes = layer.LayerSizes(2880, 64, 8, 64, 128, 32, 4, 2880, 1e-5, 7.0, 1.702)
    assert sizes.covered
    wrong = ({"d_head": 24}, {"d_model": 2896}, {"d_mlp": 80}, {"num_experts": 5}, {"num_experts": 2})
    assert not any(sizes._replace(**change).covered for change in wrong)
    assert list(layer_records.Phase) == list(range(len(layer_records.Phase)))
    assert layer_records.BLOCK % row_loops.LANES == piece_loops.DENSE_CHUNK % row_loops.LANES == 0
