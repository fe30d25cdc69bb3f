"""Attention in blocks against the whole softmax with its sink in float64."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import attention as attend


def slow(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """One query of one head at a time."""
    batch, n, heads, d = q.shape
    z, lse = torch.zeros_like(q, dtype=torch.float64), torch.zeros(batch, n, heads, dtype=torch.float64)
    for b in range(batch):
        for t in range(n):
            p = int(pos[b, t])
            keys = slice(0 if window is None else max(0, p - window + 1), p + 1)
            for h in range(heads):
                kv = h // (heads // k.shape[2])
                score = k[b, keys, kv].double() @ q[b, t, h].double() / d**0.5
                lse[b, t, h] = score.logsumexp(0)
                z[b, t, h] = score.softmax(0) @ v[b, keys, kv].double()
    return z, lse


@pytest.mark.parametrize("window", [None, 1, 16, 500])
@pytest.mark.parametrize("block", [7, 256])
def test_blocks_equal_the_whole(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_QUERY_BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 30, 6, 8, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, 2, 41, 3, 8, generator=rng, dtype=torch.float64)
    pos = torch.arange(30) + torch.tensor([[11], [4]])  # rows that continue prefixes of unequal length
    for got, want in zip(attend.attention(q, k, v, pos, window), slow(q, k, v, pos, window), strict=True):
        torch.testing.assert_close(got, want)


def test_a_masked_row_is_zero_and_its_sink_takes_all_with_finite_gradients() -> None:
    scores = torch.full((1, 1, 1, 4), -torch.inf, requires_grad=True)
    pattern, lse = attend.softmax(scores)
    assert (pattern == 0).all()
    sink = torch.sigmoid(0 - lse)
    assert (sink == 1).all()
    (grad,) = torch.autograd.grad((pattern.sum() + sink.sum()), scores)
    assert torch.isfinite(grad).all()


def test_huge_scores_do_not_overflow() -> None:
    q = torch.full((1, 3, 1, 2), 300.0)
    z, lse = attend.attention(q, q, torch.ones_like(q), torch.arange(3)[None], None)
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(z, torch.ones_like(z))
