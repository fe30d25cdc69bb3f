"""Every hook point has the same name, axes and values on every way: alone, padded, packed, step by step."""

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from workbench.hooks.names import hook_points
from workbench.model.cache import KVCache
from workbench.model.transformer import GptOss

LENGTHS = [17, 1, 33]
ROWS = torch.randint(BASE.d_vocab, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(8)).split(LENGTHS, 1)
CLOSE = dict(rtol=1e-3, atol=1e-3)
AXES = hook_points(BASE.n_layers)


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE).requires_grad_(False)


@pytest.fixture(scope="module")
def alone(base: GptOss) -> list[dict[str, Tensor]]:
    return [dict(base.run_with_cache(row)[1]) for row in ROWS]


def check(got: Tensor, want: Tensor, name: str) -> None:
    assert got.shape == want.shape, name
    if got.is_floating_point():
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(got, want), name


def cut(x: Tensor, name: str, row: int, queries: slice, keys: slice) -> Tensor:
    """A sequence's own part of an activation of many."""
    if "query_pos" in AXES[name]:
        return x[row : row + 1, :, queries, keys]
    return x[row : row + 1, queries]


@torch.no_grad()
def test_padded(base: GptOss, alone: list[dict[str, Tensor]]) -> None:
    padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in ROWS], batch_first=True, padding_value=3)
    _, cache = base.run_with_cache(padded, n_real=LENGTHS)
    assert list(cache.keys()) == list(AXES)
    for name in AXES:
        for i, n in enumerate(LENGTHS):
            check(cut(cache[name], name, i, slice(n), slice(n)), alone[i][name], name)


@torch.no_grad()
def test_packed(base: GptOss, alone: list[dict[str, Tensor]]) -> None:
    _, cache = base.run_with_cache(torch.cat(ROWS, 1), packed=LENGTHS)
    assert list(cache.keys()) == list(AXES)
    for name in AXES:
        end = 0
        for i, n in enumerate(LENGTHS):
            own = slice(end, end + n)
            check(cut(cache[name], name, 0, own, own), alone[i][name], name)
            end += n


@torch.no_grad()
def test_step_by_step(base: GptOss, alone: list[dict[str, Tensor]]) -> None:
    """Keys and values of a step are its own; scores and patterns are a row over all keys so far."""
    complete, n = alone[2], LENGTHS[2]
    held = KVCache(BASE, 1, n, dtype=torch.float32, device=torch.device("cpu"))
    begin = 0
    for step in (12, *[1] * (n - 12)):
        _, cache = base.run_with_cache(ROWS[2][:, begin : begin + step], cache=held)
        assert list(cache.keys()) == list(AXES)
        for name in AXES:
            check(cache[name], cut(complete[name], name, 0, slice(begin, begin + step), slice(begin + step)), name)
        begin += step


def test_a_step_off_by_one_would_be_seen(base: GptOss, alone: list[dict[str, Tensor]]) -> None:
    for name, want in alone[2].items():
        if "ln1.hook_scale" not in name:
            shifted = want.roll(1, AXES[name].split().index("query_pos" if "query_pos" in AXES[name] else "pos"))
            with pytest.raises(AssertionError):
                check(shifted, want, name)
