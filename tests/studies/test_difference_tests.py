"""Means of differences have the intervals that scipy computes where values are symmetric, and none of few prompts."""

import numpy as np
import pytest
import scipy.stats

from workbench.studies import intervals
from workbench.studies.difference_tests import paired_influence, paired_test, unpaired_test, weighted_mean
from workbench.studies.intervals import MIN_PROMPTS


def symmetric(n: int, center: float, seed: int = 0) -> np.ndarray:
    """Values of n prompts without skewness, so that the correction for it changes nothing."""
    half = np.random.default_rng(seed).normal(size=n // 2)
    return center + np.concatenate([half, -half])


def test_equal_weights_are_the_one_sample_t_test() -> None:
    values = symmetric(20, 0.3)
    tested, wanted = paired_test(values[:, None]), scipy.stats.ttest_1samp(values, 0)
    interval = wanted.confidence_interval()
    np.testing.assert_allclose(
        [float(tested[name][0]) for name in ("difference", "low", "high", "p")],
        [values.mean(), interval.low, interval.high, wanted.pvalue],
        rtol=1e-6,
    )
    pooled = scipy.stats.ttest_ind(values, np.zeros(20)).confidence_interval()  # negative control: unpaired
    assert abs(pooled.low - float(tested["low"][0])) > 1e-3


def test_different_prompts_have_the_standard_error_of_welch() -> None:
    a, b = symmetric(16, 1.0), symmetric(24, 0.2, seed=1) * 3
    tested = unpaired_test(a[:, None], b[:, None])
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    width = scipy.stats.t.ppf(0.975, len(a) - 1) * error
    np.testing.assert_allclose(float(tested["high"][0] - tested["low"][0]), 2 * width, rtol=1e-6)


def test_the_standard_error_of_a_weighted_mean_is_that_of_leaving_prompts_out() -> None:
    rng = np.random.default_rng(2)
    values, weight = rng.normal(size=(9, 2)), rng.uniform(0.1, 2, 9)
    without_one = [np.arange(9) != i for i in range(9)]
    without = np.stack([weighted_mean(values[k], weight[k]) for k in without_one])
    influence, freedom = paired_influence(values, weight)
    error = np.sqrt(8 / 9 * ((without - without.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(np.sqrt((influence**2).sum(0)), error, rtol=1e-12)
    assert 0 < freedom < 8
    assert np.allclose(paired_influence(values, np.ones(9))[1], 8)


@pytest.mark.parametrize("n", [0, 1, MIN_PROMPTS - 1])
def test_too_few_prompts_have_no_interval(n: int) -> None:
    tested = paired_test(np.ones((n, 3)) * np.arange(3))
    assert all(np.isnan(tested[name]).all() for name in ("low", "high", "p", "q"))
    assert not tested["different"].any()
    enough = paired_test(symmetric(MIN_PROMPTS + 1, 5.0)[:, None])
    assert np.isfinite(enough["p"]).all()


def test_few_prompts_that_agree_by_chance_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of 256 experts in five prompts with three tokens a side, of one distribution on both sides.

    Some cells have the same difference in all prompts. Planted: twelve prompts with one difference. Negative control:
    p of 0 where all prompts agree.
    """
    draws = np.random.default_rng(0).binomial(3, 1 / 8, (2, 100, 5, 256)) / 12

    def families() -> int:
        return sum(int(paired_test(a - b)["different"].any()) for a, b in zip(*draws, strict=True))

    assert families() <= 8
    assert paired_test(np.full((12, 3), 0.25))["different"].all()
    real = intervals.test_of_moments

    def certain(mean: np.ndarray, error: np.ndarray, third: np.ndarray, freedom: float) -> intervals.MeanTest:
        tested = real(mean, error, third, freedom)
        return tested._replace(p=np.where((error == 0) & (mean != 0), 0.0, tested.p))

    monkeypatch.setattr(intervals, "test_of_moments", certain)
    assert families() > 15, "negative control"
