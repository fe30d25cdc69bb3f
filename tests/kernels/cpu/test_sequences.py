"""Causal attention by tiles, `workbench.kernels.cpu.sequences`, against float64; its loops are those of
`workbench.kernels.cpu.sequence_loops`.
"""

import pytest
import torch
from torch import Tensor

from workbench.kernels import attention as attend
from workbench.kernels import cpu

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import sequences, tiles

if not tiles.available():
    pytest.skip("tiles need AVX-512", allow_module_level=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tensors(rows: int, queries: int, keys: int, heads: int, kv: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(rows, queries, heads, width),
        normal(rows, keys, kv, width, seed=1),
        normal(rows, keys, kv, width, seed=2),
    )


def slow(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int | None, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """The complete softmax in float64, with the sink as one more score whose weight is left out."""
    group = q.shape[2] // k.shape[2]
    k, v = (part.double().repeat_interleave(group, 2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k) / q.shape[3] ** 0.5
    distance = pos[:, :, None] - torch.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (window or 10**6))
    scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
    extra = torch.full((*scores.shape[:3], 1), -torch.inf) if sinks is None else sinks[:, None].expand(*q.shape[:3], 1)
    weights = torch.cat([scores, extra.double()], -1).softmax(-1)
    lse = torch.cat([scores, extra.double()], -1).logsumexp(-1)
    return torch.einsum("bqhk,bkhd->bqhd", weights[..., :-1], v), lse, weights[..., -1]


def excess(got: tuple[Tensor | None, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error of attention beyond its rounding to bfloat16, and of the others, in units of 1e-6."""
    z, lse, p = got
    errors = [((z - want[0]).abs() - want[0].abs() * 2**-8).max(), (lse - want[1]).abs().max() / 5]
    return float(torch.stack([*errors] if p is None else [*errors, (p - want[2]).abs().max()]).max()) * 1e6


SHAPES = [(1, 16, 8, 8, 32), (2, 33, 4, 2, 64), (1, 300, 8, 1, 64), (3, 64, 3, 3, 96), (1, 140, 16, 2, 64)]


@pytest.mark.parametrize(("rows", "queries", "heads", "kv", "width"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 20, 128])
def test_attention_equals_float64(
    rows: int, queries: int, heads: int, kv: int, width: int, window: int | None, number_of_threads: int
) -> None:
    q, k, v = tensors(rows, queries, queries, heads, kv, width)
    pos, sinks = torch.arange(queries).expand(rows, queries), normal(heads, seed=3)
    for own in (sinks, None):
        assert excess(sequences.attention(q, k, v, pos, window, own), slow(q, k, v, pos, window, own)) < 1


@pytest.mark.parametrize("window", [None, 20])
def test_queries_after_keys_of_a_cache(window: int | None) -> None:
    q, k, v = tensors(3, 50, 300, 8, 2, 64)
    pos, sinks = torch.tensor([[0], [131], [250]]) + torch.arange(50), normal(8, seed=3)
    want = slow(q, k, v, pos, window, sinks)
    assert excess(sequences.attention(q, k, v, pos, window, sinks), want) < 1
    cached = (torch.cat([part, part], 1)[:, :300].transpose(1, 2).contiguous().transpose(1, 2) for part in (k, v))
    assert excess(sequences.attention(q, *cached, pos, window, sinks), want) < 1, "other strides"
    assert excess(sequences.attention(q, k, v, pos + 1, window, sinks), want) > 1000


@pytest.mark.parametrize("broken", ["window", "scale", "sink", "neighbouring head", "value"])
def test_the_comparison_rejects_broken_implementations(broken: str) -> None:
    q, k, v = tensors(1, 200, 200, 8, 2, 64)
    pos, sinks, window = torch.arange(200)[None], normal(8, seed=3), 40
    want = slow(q, k, v, pos, window, sinks)
    if broken == "window":
        window = 41
    elif broken == "scale":
        q = q * 1.0625
    elif broken == "sink":
        sinks = sinks + 0.0625
    elif broken == "neighbouring head":
        q = q.roll(1, 2)
    else:
        v = v.clone()
        v[0, 150, 1, 63] += 1
    assert excess(sequences.attention(q, k, v, pos, window, sinks), want) > 1000


def test_scores_of_any_size() -> None:
    """A sink or a key far above all others takes all weight; nothing overflows."""
    q, k, v = tensors(1, 100, 100, 4, 2, 64)
    pos = torch.arange(100)[None]
    for sinks in (torch.tensor([1e4, -1e4, 80.0, -200.0]), torch.zeros(4)):
        want = slow(q * 30, k * 30, v, pos, None, sinks)
        got = sequences.attention(q * 30, k * 30, v, pos, None, sinks)
        assert got[0].isfinite().all()
        assert ((got[0] - want[0]).abs() <= want[0].abs() * 2**-8 + 1e-3).all()
        torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(got[2].double(), want[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("window", [None, 30])
def test_nan_reaches_exactly_the_queries_that_see_it(side: str, window: int | None) -> None:
    q, k, v = tensors(2, 120, 120, 4, 2, 64)
    {"q": q, "k": k}[side][1, 50, 1, 3] = torch.nan
    pos, sinks = torch.arange(120).expand(2, 120), normal(4, seed=3)
    got, want = sequences.attention(q, k, v, pos, window, sinks), slow(q, k, v, pos, window, sinks)
    assert want[1].isnan().any()
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[1].isnan(), want[1].isnan())


def test_heads_of_keys_are_arranged_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(2, 90, 90, 6, 3, 32)
    pos, sinks = torch.arange(90).expand(2, 90), normal(6, seed=3)
    together = sequences.attention(q, k, v, pos, 25, sinks)
    monkeypatch.setattr(sequences, "_ARRANGED_NUMBERS", 1)
    assert all(map(torch.equal, sequences.attention(q, k, v, pos, 25, sinks), together))


def test_sequences_take_the_loops_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = sequences.attention
    monkeypatch.setattr(sequences, "attention", lambda q, *given: made.append(q.shape[1]) or original(q, *given))
    monkeypatch.setattr(cpu, "_widens", lambda: True)
    q, k, v = tensors(1, 100, 100, 4, 2, 64)
    pos, sinks = torch.cat([torch.arange(40), torch.arange(60)])[None], normal(4, seed=3)
    packed = attend.attention(q, k, v, pos, 30, lengths=[40, 60], sinks=sinks)
    assert made == [40, 60]
    parts = [slice(0, 40), slice(40, 100)]
    want = [slow(q[:, s], k[:, s], v[:, s], pos[:, s], 30, sinks) for s in parts]
    assert excess(packed, tuple(torch.cat(part, 1) for part in zip(*want, strict=True))) < 1
    attend.attention(q[:, :15], k[:, :15], v[:, :15], pos[:, :15], 30, sinks=sinks)
    attend.attention(q.float(), k.float(), v.float(), pos, 30, sinks=sinks)
    attend.attention(q.requires_grad_(), k, v, pos, 30, sinks=sinks)
    monkeypatch.setattr(cpu, "_widens", lambda: False)
    attend.attention(q.detach(), k, v, pos, 30, sinks=sinks)
    assert len(made) == 2
