"""Intervals over prompts cover 93 to 97 %, tests keep their level, and shares stay between 0 and 1.

Short by default; `--long` runs the simulation whose results docs/statistics.md lists.
"""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from workbench.errors import InputError
from workbench.studies import intervals
from workbench.studies.intervals import (
    FewPromptsWarning,
    mean_effect,
    mean_test,
    ratio,
    share_change_interval,
    share_interval,
    wilson,
    within_bounds,
)
from workbench.studies.resampling import bootstrap_weights, percentile_interval
from workbench.studies.statistics import false_discovery

pytestmark = pytest.mark.filterwarnings("ignore:only .* prompts")
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(0.5, 1, shape), 0.5),
    "heavy tails": (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    "exponential": (lambda rng, shape: -rng.exponential(1, shape), -1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 0.8, shape), float(np.exp(0.32))),
    "30 % change": (lambda rng, shape: -(rng.random(shape) < 0.3).astype(float) * rng.exponential(5, shape), -1.5),
    "10 % change": (lambda rng, shape: -(rng.random(shape) < 0.1).astype(float) * rng.exponential(5, shape), -0.5),
    "10 % are 1": (lambda rng, shape: (rng.random(shape) < 0.1).astype(float), 0.1),
    "2 % are 1": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
    "2 % of 50 tokens": (lambda rng, shape: rng.binomial(50, 0.02, shape) / 50, 0.02),
    "very skewed": (lambda rng, shape: rng.lognormal(0, 1.33, shape), float(np.exp(1.33**2 / 2))),
}
Estimator = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]  # values [trial, prompt]: low, high, p


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def by_mean_test(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, mean = values.shape[-1], values.mean(-1)
    influence = (values - mean[:, None]) / np.sqrt(n * (n - 1))
    low, high, p, _ = mean_test(mean, influence.T, n - 1.0)
    return np.asarray(low), np.asarray(high), np.asarray(p)


def by_mean_effect(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    result = mean_effect(values, names(values.shape[-1]), n_boot=600, seed=values.shape[-1])
    return result.low, result.high, result.p


def by_student(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    interval = scipy.stats.ttest_1samp(values, 0, axis=-1)
    low, high = interval.confidence_interval()
    return np.asarray(low), np.asarray(high), np.asarray(interval.pvalue)


def by_percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = bootstrap_weights(values.shape[-1], 600, np.random.default_rng(values.shape[-1]))
    low, high = percentile_interval((values @ weights.T).T)
    return low, high, np.where((low > 0) | (high < 0), 0.0, 1.0)


ESTIMATORS: dict[str, Estimator] = {
    "mean_test": by_mean_test,
    "mean_effect": by_mean_effect,
    "Student's t": by_student,
    "percentiles": by_percentiles,
}


@pytest.mark.filterwarnings("ignore:Precision loss", "ignore:invalid value")
@pytest.mark.parametrize("kind", list(DRAWS))
def test_an_interval_of_a_mean_covers_it(kind: str, long: bool) -> None:
    """Among samples whose prompts differ. Negative controls: Student's t, and percentiles, cover too seldom."""
    draw, mean = DRAWS[kind]
    trials = 3000 if long else 400
    slack = 0.005 if long else 0.025  # the standard error of 400 trials is 0.011, of 3,000 it is 0.004
    for n in (5, 8, 12, 20, 50, 200) if long else (12, 50):
        values = draw(np.random.default_rng([n, len(kind)]), (trials, n))
        values = values[values.std(-1) > 0]
        covered = {}
        for name, estimate in ESTIMATORS.items():
            low, high, _ = estimate(values)
            _, _, null = estimate(values - mean)
            covered[name] = float(((low <= mean) & (mean <= high)).mean())
            covered[f"{name}, p"] = float((null <= 0.05).mean())
        row = (f"{covered[name]:.3f}, {covered[f'{name}, p']:.3f}" for name in ESTIMATORS)
        print(f"| {kind} | {n} | {len(values) / trials:.2f} | {' | '.join(row)} |")
        for name in ("mean_test", "mean_effect"):
            if n >= 12:
                assert covered[name] >= 0.93 - slack, (name, n)
                assert covered[f"{name}, p"] <= 0.07 + slack, (name, n)
            if n >= 12 and kind in ("normal", "exponential", "lognormal"):
                assert covered[name] <= 0.97 + slack, (name, n)
        if n == 12 and kind in ("exponential", "lognormal", "30 % change"):
            assert covered["Student's t"] < 0.925, "negative control"
        if n == 12 and kind in ("normal", "exponential", "30 % change"):
            assert covered["percentiles"] < 0.93, "negative control"


def test_both_estimators_of_skewed_means_agree() -> None:
    """Two methods whose only common part is Student's t: limits differ by less than a fifth of the width."""
    rng = np.random.default_rng(0)
    values = rng.exponential(1, (200, 40))
    ours, theirs = by_mean_test(values), by_mean_effect(values)
    width = ours[1] - ours[0]
    for i in (0, 1):
        assert np.quantile(np.abs(ours[i] - theirs[i]) / width, 0.9) < 0.2
    student = by_student(values)
    assert np.median((ours[1] - student[1]) / width) > 0.03, "negative control: Student's t is shorter above"


def test_the_test_of_a_mean_is_its_interval_and_has_no_direction() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.exponential(1, (300, 15)) - rng.random((300, 1)), rng.normal(0.3, 1, (300, 15))])
    low, high, p = by_mean_test(values)
    np.testing.assert_array_equal(p < 0.05, (low > 0) | (high < 0))
    mirrored = by_mean_test(-values)
    np.testing.assert_allclose(mirrored[0], -high)
    np.testing.assert_allclose(mirrored[2], p)
    mean, n = values.mean(-1), 15
    result = mean_test(mean, ((values - mean[:, None]) / np.sqrt(n * (n - 1))).T, n - 1.0)
    assert (result.bound >= np.abs(mean)).all()
    assert (result.bound < np.maximum(np.abs(result.low), np.abs(result.high))).all()
    constant = mean_test(np.array([0.0, 2.0]), np.zeros((9, 2)), 8.0)
    assert constant.p.tolist() == [1.0, 2.0**-8], "that of the sign test: nine prompts of one sign"
    unknown = mean_test(np.array([1.0]), np.full((1, 1), np.nan), 1.0)
    assert np.isnan([unknown.low, unknown.high, unknown.p, unknown.bound]).all()


def test_a_more_skewed_sample_has_no_narrower_interval() -> None:
    """One of 12 prompts changes by ever more. Negative control: the same without the limit of the skewness."""

    def highs() -> np.ndarray:
        values = np.zeros((40, 12))
        values[:, 1:] = np.linspace(0, 0.5, 40)[:, None] * np.random.default_rng(0).normal(size=11)
        values[:, 0] = 1
        high = by_mean_test(values)[1]
        return (high - values.mean(1)) / (values.std(1, ddof=1) / np.sqrt(12))

    limited = highs()
    assert limited[0] > limited.max() - 1e-9  # a single prompt that changed is the most skewed sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_widest_skewness", lambda edge: np.inf)
        assert highs()[0] < 0.8 * highs().max(), "negative control"


def test_quantities_between_0_and_1_stay_there_and_have_a_width() -> None:
    value, low, high = intervals.mean_of_prompts(np.array([[1.0, 0.0, 0.9, 0.98]] * 8 + [[1.0, 0.0, 1.0, 0.98]]))
    cut = within_bounds(value, low, high, 9)
    assert cut[0].min() >= 0
    assert cut[1].max() <= 1
    assert (cut[1] - cut[0] > 0.01).all()
    assert (cut[0] <= value).all()
    assert (value <= cut[1]).all()
    assert np.isnan(within_bounds(np.nan, np.nan, np.nan, 0)).all()
    assert (high - low)[:2].max() < 1e-9, "negative control: no width"


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
    result = mean_effect(np.stack([small, wide, small + 1]), names(40))
    assert result.equivalent.tolist() == [True, False, False]
    assert result.p[1] > 0.05, "negative control: not shown, and not absent either"
    assert not mean_effect(small, names(40), smallest_effect=0.001).equivalent
    at_bound = mean_effect(rng.normal(0.1, 0.2, (1000, 30)), names(30), n_boot=200)
    assert at_bound.equivalent.mean() <= 0.08, "an effect at the bound is called absent at most at the level"


def test_prompts_that_all_agree_have_no_interval_of_a_mean() -> None:
    unnamed = mean_effect(np.stack([np.zeros(12), np.full(12, -2.0)]), names(12))
    assert np.isnan(unnamed.low).all()
    assert unnamed.p.tolist() == [1.0, 2.0**-11], "that of the sign test"
    assert not unnamed.equivalent.any()


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
    assert [float(value), float(low)] == [-1, -1]
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


def test_with_equal_tokens_it_is_the_t_interval_of_a_mean() -> None:
    """Without skewness; a skewed sample has a wider interval, on the side of its long tail."""
    x = np.random.default_rng(0).normal(size=30)
    x = np.concatenate([x, -x])
    value, low, high = ratio(x + 1, np.ones(60))
    theirs = scipy.stats.ttest_1samp(x + 1, 0).confidence_interval()
    assert value == pytest.approx(1)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=1e-3)
    skewed = np.exp(x)
    value, low, high = ratio(skewed, np.ones(60))
    theirs = scipy.stats.ttest_1samp(skewed, 0).confidence_interval()
    assert low == pytest.approx(theirs.low)
    assert high > theirs.high


def test_it_covers_a_ratio_of_clustered_sums() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        tokens = rng.integers(5, 60, 40)
        habit = rng.normal(0.3, 0.05, 40)
        sums = np.array([rng.normal(h, 0.1, n).sum() for h, n in zip(habit, tokens, strict=True)])
        _, low, high = ratio(sums, tokens)
        inside += bool(low <= 0.3 <= high)
    assert 0.925 <= inside / 400 <= 0.98


def test_nothing_is_missing_and_one_prompt_has_no_interval() -> None:
    assert np.isnan(ratio(np.zeros((3, 2)), np.zeros(3))[0]).all()
    value, low, _ = ratio(np.array([4.0, 0.0]), np.array([2.0, 0.0]))
    assert value == 2
    assert np.isnan(low)


def test_shares_of_cells_count_their_answers() -> None:
    """Three equal answers of a prompt are one; three that differ count for more."""
    agreeing, mixed = np.repeat([[1.0, 0.0]], 20, axis=1), np.full((1, 40), 2 / 3)
    mixed[:, ::2] = 1 / 3
    widths = []
    for means in (agreeing, mixed):
        share, low, high = wilson(means, 120)
        assert share == pytest.approx(0.5)
        widths.append(float(high[0] - low[0]))
    assert widths[1] < 0.7 * widths[0]
