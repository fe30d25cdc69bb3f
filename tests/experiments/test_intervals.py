"""Intervals over prompts cover 93 to 97 %, tests keep their level, and shares stay between 0 and 1.

Short by default; `--long` runs the simulation whose results docs/statistics.md lists.
"""

from collections.abc import Callable

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.experiments import intervals
from workbench.experiments.intervals import (
    FewPromptsWarning,
    false_discovery,
    mean_effect,
    share_change_interval,
    share_interval,
)
from workbench.studies.resampling import bootstrap_weights, percentile_interval

pytestmark = pytest.mark.filterwarnings("ignore:only .* prompts")
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(0.5, 1, shape), 0.5),
    "skewed": (lambda rng, shape: -rng.exponential(1, shape), -1.0),
    "rare": (lambda rng, shape: -(rng.random(shape) < 0.3).astype(float) * rng.exponential(5, shape), -1.5),
}


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def coverage(kind: str, n: int, trials: int) -> tuple[float, float, float]:
    """How often the interval covers the mean, how often the percentile bootstrap does, and false positives."""
    draw, mean = DRAWS[kind]
    values = draw(np.random.default_rng([n, len(kind)]), (trials, n))
    found = mean_effect(values, names(n), n_boot=600, seed=n)
    known = ~np.isnan(found.low)
    weights = bootstrap_weights(n, 600, np.random.default_rng(n))
    low, high = percentile_interval((values @ weights.T).T)
    null = mean_effect(values - mean, names(n), n_boot=600, seed=n)
    covered = (found.low <= mean) & (mean <= found.high)
    return float(covered[known].mean()), float(((low <= mean) & (mean <= high)).mean()), float((null.p <= 0.05).mean())


@pytest.mark.parametrize("kind", list(DRAWS))
def test_an_interval_of_a_mean_covers_it(kind: str, long: bool) -> None:
    """Negative control: the percentile bootstrap, which was used before, covers too seldom at 12 prompts."""
    trials = 3000 if long else 400
    slack = 0.0 if long else 0.02  # the standard error of 400 trials is 0.011
    for n in (12, 20, 50, 200) if long else (12, 50):
        covered, percentile, false_positives = coverage(kind, n, trials)
        print(
            f"{kind:7} {n:4} prompts: {covered:.3f}, percentile bootstrap {percentile:.3f}, p ≤ 0.05 {false_positives:.3f}"
        )
        assert 0.93 - slack <= covered <= 0.985 + slack
        assert false_positives <= 0.07 + slack
        if n == 12:
            assert percentile < 0.93, "negative control"


def test_few_prompts_are_refused_or_a_warning() -> None:
    with pytest.raises(InputError, match="4 prompts have a value, and an interval needs at least 5"):
        mean_effect(np.arange(4.0), names(4))
    with pytest.raises(InputError, match="method='percentile'"):
        mean_effect(np.arange(9.0), names(9), method="percentile")  # type: ignore[arg-type]
    with pytest.warns(FewPromptsWarning, match="only 19 prompts"):
        mean_effect(np.arange(19.0), names(19))
    with pytest.warns(FewPromptsWarning):
        share_interval(np.ones(5), names(5))


def test_absence_needs_an_equivalence_bound() -> None:
    rng = np.random.default_rng(0)
    small, wide = rng.normal(0, 0.1, 40), rng.normal(0, 3, 40)
    found = mean_effect(np.stack([small, wide, small + 1]), names(40))
    assert found.equivalent.tolist() == [True, False, False]
    assert found.p[1] > 0.05, "negative control: not shown, and not absent either"
    assert not mean_effect(small, names(40), smallest_effect=0.001).equivalent
    at_bound = mean_effect(rng.normal(0.1, 0.2, (1000, 30)), names(30), n_boot=200)
    assert at_bound.equivalent.mean() <= 0.08, "an effect at the bound is called absent at most at the level"


def test_prompts_that_all_agree_have_no_interval_of_a_mean() -> None:
    found = mean_effect(np.stack([np.zeros(12), np.full(12, -2.0)]), names(12))
    assert np.isnan(found.low).all()
    assert found.p.tolist() == [1.0, 1.0]
    assert not found.equivalent.any()


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_shares_have_intervals_within_their_bounds_that_cover(per_prompt: int, long: bool) -> None:
    """Negative control: the percentile bootstrap of the same shares collapses near 1."""
    rng, trials = np.random.default_rng(per_prompt), 3000 if long else 400
    for share in (0.05, 0.5, 0.97):
        for n in (12, 40):
            ability = (
                rng.beta(8 * share, 8 * (1 - share), (trials, n)) if per_prompt > 1 else np.full((trials, n), share)
            )
            right = (rng.random((trials, n, per_prompt)) < ability[..., None]).astype(float)
            value, low, high = share_interval(right.reshape(trials, -1), np.repeat(names(n), per_prompt))
            np.testing.assert_allclose(value, right.mean((1, 2)))
            assert low.min() >= 0
            assert high.max() <= 1
            assert (high - low).min() > 0.01, "never without a width"
            assert ((low <= share) & (share <= high)).mean() >= (0.93 if long else 0.91)
            if share == 0.97 and n == 12:
                weights = bootstrap_weights(n, 300, rng)
                edges = percentile_interval((right.mean(2) @ weights.T).T)
                assert ((edges[0] <= share) & (share <= edges[1])).mean() < 0.75
                assert (edges[1] - edges[0]).min() < 1e-9


def test_changes_of_shares_have_a_width_also_where_nothing_changed() -> None:
    rng = np.random.default_rng(3)
    value, low, high = share_change_interval(np.zeros(30), names(30))
    assert value == 0
    assert -0.2 < low < 0 < high < 0.2
    value, low, high = share_change_interval(np.full(30, -1.0), names(30))
    assert (value, low) == (-1, -1)
    assert -1 < high < -0.7
    u = rng.random((600, 30))
    _, low, high = share_change_interval(np.where(u < 0.3, -1.0, np.where(u > 0.9, 1.0, 0.0)), names(30))
    assert 0.92 <= ((low <= -0.2) & (high >= -0.2)).mean() <= 0.99


def test_a_family_is_tested_together() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.9])
    np.testing.assert_allclose(false_discovery(p), [0.03, np.nan, 0.06, 0.9])


def test_prompts_are_the_unit() -> None:
    """Negative control: every sequence as a prompt of its own gives far narrower intervals."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(0, 1, 20), 10)
    right, wrong = (mean_effect(values, units) for units in (np.repeat(names(20), 10), names(200)))
    assert right.prompts == 20
    assert right.high - right.low > 2.5 * (wrong.high - wrong.low)
    assert intervals.prompt_means(values, np.repeat(names(20), 10)).shape == (20,)
