"""The jackknife of a ratio: its intervals cover, and it agrees with the textbook on a mean."""

import numpy as np
import pytest
import scipy.stats

from workbench.studies.ratio import ratio


def test_with_equal_tokens_it_is_the_t_interval_of_a_mean():
    x = np.random.default_rng(0).normal(size=30)
    value, low, high = ratio(x, np.ones(30))
    theirs = scipy.stats.ttest_1samp(x, 0).confidence_interval()
    assert value == pytest.approx(x.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high))


def test_it_covers_a_ratio_of_clustered_sums():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        tokens = rng.integers(5, 60, 40)
        habit = rng.normal(0.3, 0.05, 40)
        sums = np.array([rng.normal(h, 0.1, n).sum() for h, n in zip(habit, tokens, strict=True)])
        _, low, high = ratio(sums, tokens)
        inside += bool(low <= 0.3 <= high)
    assert 0.925 <= inside / 400 <= 0.98


def test_nothing_is_missing_and_one_prompt_has_no_interval():
    assert np.isnan(ratio(np.zeros((3, 2)), np.zeros(3))[0]).all()
    value, low, _ = ratio(np.array([4.0, 0.0]), np.array([2.0, 0.0]))
    assert value == 2
    assert np.isnan(low)
