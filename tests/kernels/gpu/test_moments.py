"""Moments by label, both implementations, against a float64 loop over labels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import moments as reference
from workbench.kernels.gpu import moments as kernels
from workbench.kernels.moments import Moments

Implementation = Callable[[Tensor, Tensor, int], Moments]
both = pytest.mark.parametrize("moments", [reference.moments, kernels.moments], ids=["torch", "kernel"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def slow(x: Tensor, labels: Tensor, n_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = [x[labels == label].double() for label in range(n_labels)]
    return (
        torch.tensor([len(r) for r in rows]),
        torch.stack([r.sum(0) for r in rows]),
        torch.stack([r.square().sum(0) for r in rows]),
    )


def error(got: Moments, x: Tensor, labels: Tensor) -> float:
    """Largest error of a sum or a sum of squares, in units of what that label's magnitudes add up to."""
    assert got.sums.dtype == got.squares.dtype == torch.float32
    counts, sums, squares = slow(x, labels, len(got.counts))
    assert torch.equal(got.counts, counts)
    size = slow(x.abs(), labels, len(got.counts))[1]
    parts = ((got.sums - sums).abs() / (size + 1e-30), (got.squares - squares).abs() / (squares + 1e-30))
    return max(float(p.max()) for p in parts)


@both
@pytest.mark.parametrize(("tokens", "d", "n_labels"), [(1, 1, 1), (7, 33, 9), (1100, 130, 3), (600, 16, 40)])
def test_moments_of_any_size(moments: Implementation, tokens: int, d: int, n_labels: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d, generator=rng)
    labels = torch.randint(-1, n_labels, (tokens,), generator=rng)
    assert error(moments(x, labels, n_labels), x, labels) < 1e-6
    one_moved = labels.clone()
    one_moved[0] = (labels[0] + 1) % n_labels if labels[0] >= 0 else 0
    if not torch.equal(one_moved, labels):
        assert not torch.allclose(moments(x, one_moved, n_labels).squares, moments(x, labels, n_labels).squares)


@both
def test_labels_nobody_has_and_tokens_nobody_selects(moments: Implementation) -> None:
    x = torch.full((5, 4), 2.0, dtype=torch.bfloat16)
    counts, sums, squares = moments(x, torch.tensor([3, -1, 3, -7, 3]), 5)
    assert counts.tolist() == [0, 0, 0, 3, 0]
    assert sums[:, 0].tolist() == [0, 0, 0, 6, 0]
    assert squares[:, 0].tolist() == [0, 0, 0, 12, 0]
    assert not moments(x, torch.full((5,), -1), 2).squares.any()


@pytest.mark.parametrize(
    ("moments", "tokens"), [(reference.moments, 1_000_000), (kernels.moments, 60_000)], ids=["torch", "kernel"]
)
def test_many_tokens_lose_no_accuracy(moments: Implementation, tokens: int) -> None:
    """A mean of 100 beside a deviation of 1: one running float32 sum is off by more than this allows.

    A million tokens are too long for the interpreter in every run; measured once: 1.0e-7 (sums), 1.8e-7 (squares).
    """
    x = torch.randn(tokens, 2, generator=torch.Generator().manual_seed(1)) + 100
    labels = torch.zeros(len(x), dtype=torch.int64)
    labels[:1000] = 1
    assert error(moments(x, labels, 2), x, labels) < 2e-7
    first = x[labels == 0]
    running = torch.from_numpy(np.add.accumulate(first.numpy()))[-1]
    assert float((running / first.double().sum(0) - 1).abs().max()) > 2e-7


def test_the_kernels_answer_is_the_same_every_time() -> None:
    rng = torch.Generator().manual_seed(2)
    x, labels = torch.randn(3000, 8, generator=rng), torch.randint(4, (3000,), generator=rng)
    first, second = (kernels.moments(x, labels, 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_label_too_large_is_refused_by_torch() -> None:
    with pytest.raises(ValueError, match="labels go up to 2, but n_labels is 2"):
        reference.moments(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2)
