"""The attention kernels, interpreted, against the whole softmax in float64; and wrong references they must not meet.

Also tests `workbench.kernels.gpu.attention_gradient`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import attention as attend
from workbench.kernels.gpu import attention as gpu
from workbench.kernels.gpu import tiles

Result = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def tensors(
    n: int, keys: int, heads: int, kv: int, d: int = 16, batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and sinks."""
    rng = torch.Generator().manual_seed(n + keys)
    k, v = torch.randn(2, batch, keys, kv, d, generator=rng)
    q = torch.randn(batch, n, heads, d, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.randn(heads, generator=rng).to(dtype) * 2


def reference(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int | None, sinks: Tensor | None = None, lengths: Any = None
) -> Result:
    """All scores at once, in float64; sequences end to end are masked from each other."""
    q, k, v = q.double(), k.double(), v.double()
    mask = attend.visible(pos, torch.arange(k.shape[1]), window)
    if lengths is not None:
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = attend.visible(pos, pos[0], window) & (owner[:, None] == owner)
    scores = attend.scores(q, k, mask)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
    pattern = scores.softmax(-1)
    z = attend.combine(pattern[..., : k.shape[1]], v)
    return z, scores.logsumexp(-1).mT, None if sinks is None else pattern[..., -1].mT


def errors(got: Result, want: Result) -> list[float]:
    return [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(got, want, strict=True)
        if a is not None and b is not None
    ]


SHAPES = {
    "one token": dict(n=1, heads=8, kv=1),
    "odd": dict(n=37, heads=4, kv=2, batch=2),
    "a kv head for each, d_head 24": dict(n=35, heads=3, kv=3, d=24),
    "d_head 64": dict(n=20, heads=8, kv=1, d=64),
}


@pytest.mark.parametrize("window", [None, 1, 16, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_prefill_equals_the_whole_softmax(shape: str, window: int | None, with_sinks: bool) -> None:
    sizes: dict[str, Any] = SHAPES[shape]
    q, k, v, sinks = tensors(keys=sizes["n"], **sizes)
    pos = torch.arange(q.shape[1]).expand(len(q), -1)
    got = gpu.attention(q, k, v, pos, window, sinks=sinks if with_sinks else None)
    assert max(errors(got, reference(q, k, v, pos, window, sinks if with_sinks else None))) < 2e-6


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_rows_that_continue_unequal_prefixes_in_a_longer_cache(n: int, window: int | None) -> None:
    """1 and 2 queries split the keys, 20 do not. What lies beyond a row's last position is NaN and must not matter."""
    q, k, v, sinks = tensors(n, 70, heads=8, kv=1, batch=3)
    prefix = torch.tensor([[0], [13], [50]])
    pos = prefix + torch.arange(n)
    cache = torch.full((2, 3, 90, 1, 16), torch.nan)
    for row, last in enumerate((prefix + n)[:, 0].tolist()):
        cache[:, row, :last] = torch.stack([k, v])[:, row, :last]
    strided = cache[:, :, :70]
    for given in (None, sinks):
        got = gpu.attention(q, strided[0], strided[1], pos, window, sinks=given)
        assert max(errors(got, reference(q, k, v, pos, window, given))) < 2e-6


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_end_to_end_do_not_see_each_other(window: int | None) -> None:
    lengths = [1, 0, 33, 17, 1]
    q, k, v, sinks = tensors(sum(lengths), sum(lengths), heads=4, kv=2)
    pos = torch.cat([torch.arange(n) for n in lengths])[None]
    got = gpu.attention(q, k, v, pos, window, lengths=lengths, sinks=sinks)
    assert max(errors(got, reference(q, k, v, pos, window, sinks, lengths))) < 2e-6


def test_bfloat16_is_within_twice_the_error_of_torch() -> None:
    q, k, v, sinks = tensors(50, 50, heads=8, kv=2, d=64, dtype=torch.bfloat16)
    pos = torch.arange(50)[None]
    want = reference(q, k, v, pos, 16, sinks)
    ours = errors(gpu.attention(q, k, v, pos, 16, sinks=sinks), want)
    theirs = errors(attend.attention(q, k, v, pos, 16, sinks=sinks), want)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_huge_scores_and_a_sink_that_takes_all() -> None:
    q, k, v, _ = tensors(20, 20, heads=4, kv=2)
    pos = torch.arange(20)[None]
    z, lse, sink = gpu.attention(q * 1e3, k * 1e3, v, pos, None, sinks=torch.tensor([0.0, 1e8, -1e8, 10.0]))
    assert all(torch.isfinite(t).all() for t in (z, lse, sink))
    assert (sink[:, :, 1] == 1).all()
    assert (z[:, :, 1] == 0).all()
    assert (sink[:, :, 2] == 0).all()


def test_a_decode_tile_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries of eight heads are 16 rows. A tile of 8 rows once gave NaN for them."""
    q, k, v, _ = tensors(2, 40, heads=8, kv=1)
    monkeypatch.setattr(tiles, "decode_tile", lambda *_: tiles.Tile({"BLOCK_M": 8, "BLOCK_N": 16}, 4, 1))
    with pytest.raises(ValueError, match="16 rows share a decode tile of 8"):
        gpu.attention(q, k, v, torch.arange(38, 40)[None], None)


CASES = {
    "whole rows": dict(n=37, keys=37, window=None),
    "window": dict(n=37, keys=37, window=7),
    "prefix": dict(n=20, keys=45, window=16, prefix=[25, 3]),
    "end to end": dict(n=40, keys=40, window=9, lengths=[1, 22, 0, 17]),
    "one query on many keys": dict(n=1, keys=45, window=None, prefix=[44, 20]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_of_every_output_reach_every_input(case: str, with_sinks: bool) -> None:
    sizes: dict[str, Any] = dict(CASES[case])
    window, lengths, prefix = sizes.pop("window"), sizes.pop("lengths", None), sizes.pop("prefix", [0])
    q, k, v, sinks = tensors(**sizes, heads=4, kv=2, batch=len(prefix))
    pos = torch.tensor(prefix)[:, None] + torch.arange(sizes["n"])
    if lengths is not None:
        pos = torch.cat([torch.arange(n) for n in lengths])[None]
    rng = torch.Generator().manual_seed(9)
    weights = [torch.randn(shape, generator=rng) for shape in (q.shape, q.shape[:3], q.shape[:3])]

    def gradients(attention: Callable[..., Result], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, sinks)]
        given = inputs if with_sinks else inputs[:3]
        out = attention(*inputs[:3], pos, window, sinks=inputs[3] if with_sinks else None, lengths=lengths)
        loss = sum((o * w.to(dtype)).sum() for o, w in zip(out, weights, strict=True) if o is not None)
        assert isinstance(loss, Tensor)
        return list(torch.autograd.grad(loss, given))

    got = gradients(gpu.attention, torch.float32)
    for name, a, b in zip("qkvs", got, gradients(reference, torch.float64), strict=False):
        assert float((a - b).norm() / b.norm()) < 5e-6, name


def mutants() -> dict[str, Callable[..., Result]]:
    def tiled(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Result:
        order = torch.arange(q.shape[2]).view(-1, k.shape[2]).mT.flatten()
        z, lse, sink = reference(q[:, :, order], k, v, *rest)
        return z[:, :, order.argsort()], lse, sink

    return {
        "sink dropped": lambda q, k, v, pos, window, sinks: (*reference(q, k, v, pos, window)[:2], None),
        "window one longer": lambda q, k, v, pos, window, sinks: reference(q, k, v, pos, window + 1, sinks),
        "window one shorter": lambda q, k, v, pos, window, sinks: reference(q, k, v, pos, window - 1, sinks),
        "heads tiled": tiled,
        "prefix ignored": lambda q, k, v, pos, window, sinks: reference(q, k, v, pos - pos[:, :1], window, sinks),
    }


@pytest.mark.parametrize("mutant", mutants())
def test_a_wrong_reference_is_noticed(mutant: str) -> None:
    q, k, v, sinks = tensors(20, 45, heads=4, kv=2)
    pos = 25 + torch.arange(20)[None]
    got = gpu.attention(q, k, v, pos, 16, sinks=sinks)
    assert max(errors(got, reference(q, k, v, pos, 16, sinks))) < 2e-6
    assert max(errors(got, mutants()[mutant](q, k, v, pos, 16, sinks))) > 1e-2
