"""Attention in blocks against the whole softmax with its sink in float64."""

import pytest
import torch
from torch import Tensor

from workbench.kernels import attention as attend
from workbench.kernels import cpu


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


def tensors(n: int, keys: int, *, heads: int = 6, kv: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(batch, n, heads, 8, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, kv, 8, generator=rng, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 16, 500])
@pytest.mark.parametrize("block", [7, 256])
def test_blocks_equal_the_whole(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_QUERY_BLOCK", block)
    q, k, v = tensors(30, 41)
    pos = torch.arange(30) + torch.tensor([[11], [4]])  # rows that continue prefixes of unequal length
    for got, want in zip(attend.attention(q, k, v, pos, window)[:2], slow(q, k, v, pos, window), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [None, 1, 16, 64, 100])
def test_whole_sequences_take_flash_attention_and_bands(n: int, window: int | None) -> None:
    q, k, v = tensors(n, n)
    pos = torch.arange(n).expand(2, n)
    for got, want in zip(attend.attention(q, k, v, pos, window)[:2], slow(q, k, v, pos, window), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("n", "window"), [(5, None), (130, None), (130, 16)])
def test_whole_sequences_of_bfloat16_in_float32(n: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors that multiply bfloat16 slowly: each result is rounded once, and bfloat16 gives more error."""
    if cpu.unavailable():
        pytest.skip("bfloat16 is widened beside the compiled kernels only")
    q, k, v = (t.bfloat16() for t in tensors(n, n))
    pos = torch.arange(n).expand(2, n)
    want, want_lse = slow(q, k, v, pos, window)

    def compute(widens: bool) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(cpu, "_widens", lambda: widens)
        z, lse, _ = attend.attention(q, k, v, pos, window)
        assert z.dtype == torch.bfloat16
        return (z - want).abs() - want.abs() * 2**-8, lse

    excess, lse = compute(widens=True)
    assert excess.max() < 1e-6
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert compute(widens=False)[0].max() > 1e-4
    q = q.roll(1, 2)  # negative control: heads that read their neighbour's queries
    assert compute(widens=True)[0].max() > 0.01


@pytest.mark.parametrize(("n", "window"), [(7, None), (7, 4), (70, None), (70, 16)])
@pytest.mark.parametrize("side", ["q", "k"])
def test_nan_is_not_hidden(side: str, n: int, window: int | None) -> None:
    """NaN reaches every query that sees it. In bands torch's kernel also gives it to neighbours that do not."""
    q, k, v = tensors(n, n)
    {"q": q, "k": k}[side][1, 2, 2, 3] = torch.nan
    pos = torch.arange(n).expand(2, n)
    expected = slow(q, k, v, pos, window)
    assert expected[1].isnan().any()
    for got, want in zip(attend.attention(q, k, v, pos, window)[:2], expected, strict=True):
        assert got.isnan()[want.isnan()].all()
        if window is None:
            torch.testing.assert_close(got, want, equal_nan=True)


def test_torch_hides_nan_from_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the mark, seven queries of NaN give numbers."""
    q, k, v = tensors(7, 7)
    q[:] = torch.nan
    pos = torch.arange(7).expand(2, 7)
    assert attend.attention(q, k, v, pos, None)[0].isnan().all()
    monkeypatch.setattr(attend, "_with_nan", lambda z, lse, where: (z, lse))
    if attend.attention(q, k, v, pos, None)[0].isnan().any():
        pytest.skip("this version of torch does not hide it")


@pytest.mark.parametrize("side", ["q", "k"])
def test_nan_of_a_single_query_is_not_hidden(side: str) -> None:
    q, k, v = tensors(1, 30)
    {"q": q[1, 0], "k": k[1, 29]}[side][0, 3] = torch.nan
    z, lse = attend.attention(q, k, v, torch.full((2, 1), 29), None)[:2]
    assert torch.equal(z.isnan().any(-1), lse.isnan())
    assert lse.isnan().any(-1).tolist() == [[False], [True]]


@pytest.mark.parametrize("change", [-1, 1])
def test_the_comparison_notices_a_window_that_is_off_by_one(change: int) -> None:
    q, k, v = tensors(70, 70)
    pos = torch.arange(70).expand(2, 70)
    assert not torch.allclose(attend.attention(q, k, v, pos, 16 + change)[0], slow(q, k, v, pos, 16)[0])


def test_gradients_are_those_of_the_slow_sum() -> None:
    """Asked for a gradient, the path changes; what it computes does not."""
    q, k, v = (t.requires_grad_() for t in tensors(20, 20, batch=1))
    pos = torch.arange(20)[None]
    weight = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(z: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((z * weight).sum() + (lse * weight[..., 0]).sum(), (q, k, v))

    got, want = attend.attention(q, k, v, pos, 7)[:2], slow(q, k, v, pos, 7)
    for one, other in zip(gradients(*got), gradients(*want), strict=True):
        torch.testing.assert_close(one, other)


def test_packed_sequences_do_not_see_each_other() -> None:
    q, k, v = tensors(40, 40, batch=1)
    lengths = [1, 0, 22, 17]
    pos = torch.cat([torch.arange(n) for n in lengths])[None]
    z, lse, _ = attend.attention(q, k, v, pos, 16, lengths=lengths)
    for s in attend.spans(lengths):
        want = slow(q[:, s], k[:, s], v[:, s], pos[:, s], 16)
        torch.testing.assert_close((z[:, s], lse[:, s]), want)


def test_a_sink_is_one_more_score_that_leads_nowhere() -> None:
    q, k, v = tensors(30, 30)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    pos = torch.arange(30).expand(2, 30)
    z, lse, p = attend.attention(q, k, v, pos, 16, sinks=sinks)
    scores = attend.scores(q, k, attend.visible(pos, pos[0], 16))
    complete = torch.cat([scores, sinks[None, :, None, None].expand(2, 6, 30, 1)], -1)
    torch.testing.assert_close(lse, complete.logsumexp(-1).mT)
    torch.testing.assert_close(p, complete.softmax(-1)[..., -1].mT)
    torch.testing.assert_close(z, attend.combine(complete.softmax(-1)[..., :-1], v))


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
    z, lse, _ = attend.attention(q, q, torch.ones_like(q), torch.arange(3)[None], None)
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(z, torch.ones_like(z))
