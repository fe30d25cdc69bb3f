"""The mean gradient of a normed product shares its change out exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.experiments.norm_attribution import mean_gradient, normed

D, EPS = 16, 1e-5


def draw(seed: int, n: int = 5) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrated(a: Tensor, x0: Tensor, x1: Tensor, steps: int = 4000) -> Tensor:
    """The same by autograd at many midpoints."""
    total = torch.zeros_like(x0)
    for t in (torch.arange(steps) + 0.5) / steps:
        x = (x0 + t * (x1 - x0)).requires_grad_()
        total += torch.autograd.grad(normed(a, x, EPS)[0].sum(), x)[0]
    return total / steps


def gap(g: Tensor, a: Tensor, x0: Tensor, x1: Tensor) -> float:
    change = normed(a, x1, EPS)[0] - normed(a, x0, EPS)[0]
    size = a.norm(dim=-1) * ((x1 - x0).norm(dim=-1) / normed(a, x0, EPS)[1]).clamp(max=1)
    return float((((g * (x1 - x0)).sum(-1) - change).abs() / size.clamp(min=1e-300)).max())


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.floats(-7, 4), st.floats(-3, 3), st.floats(-1, 1))
def test_the_change_is_shared_out_whole(seed: int, step: float, size: float, back: float) -> None:
    a, x0 = draw(seed), draw(seed + 1) * 10**size
    x1 = x0 + 10**step * (draw(seed + 2) - 3 * back * x0)
    g = mean_gradient(a, x0, x1, EPS)
    rounding = 1e-15 * float(((x0.norm(dim=-1) + x1.norm(dim=-1)) / (x1 - x0).norm(dim=-1)).max())
    assert gap(g, a, x0, x1) < 1e-9 + 100 * rounding


@pytest.mark.parametrize("case", ["from zero", "to zero", "through zero", "along a ray"])
def test_ways_that_meet_zero_are_no_exception(case: str) -> None:
    a, x = draw(1), draw(2)
    ends = {"from zero": (0 * x, x), "to zero": (x, 0 * x), "through zero": (-x, 2 * x), "along a ray": (x, 3 * x)}
    x0, x1 = ends[case]
    change = normed(a, x1, EPS)[0] - normed(a, x0, EPS)[0]
    torch.testing.assert_close((mean_gradient(a, x0, x1, EPS) * (x1 - x0)).sum(-1), change, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x1", [draw(3), 0.01 * draw(3) + draw(2), -0.5 * draw(2) + draw(3), 30 * draw(3)])
def test_it_is_the_mean_of_the_gradients_on_the_way(x1: Tensor) -> None:
    a, x0 = draw(1), draw(2)
    torch.testing.assert_close(mean_gradient(a, x0, x1, EPS), integrated(a, x0, x1), rtol=1e-5, atol=1e-5)


def test_the_two_tests_see_a_gradient_at_one_place_and_a_scale_held_fixed() -> None:
    a, x0, x1 = draw(1), draw(2), draw(3)
    middle = mean_gradient(a, (x0 + x1) / 2, (x0 + x1) / 2, EPS)
    frozen = a / normed(a, x1, EPS)[1][:, None]
    for broken in (middle, frozen):
        assert gap(broken, a, x0, x1) > 1e-3
        assert not torch.allclose(broken, integrated(a, x0, x1), rtol=1e-2, atol=1e-2)


def test_where_nothing_is_written_it_is_the_gradient() -> None:
    a, x = draw(1), draw(2)
    torch.testing.assert_close(mean_gradient(a, x, x.clone(), EPS), integrated(a, x, x, steps=1))
