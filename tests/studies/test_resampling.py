"""Intervals and permutation tests: against scipy where scipy can do it, and by their coverage where it cannot."""

import numpy as np
import pytest
import scipy.stats

from workbench.studies import resampling, statistics
from workbench.studies.resampling import Independent, Paired

N_BOOT = 400


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_percentile_and_bca_agree_with_scipy_on_its_own_replicates(rng):
    sample = rng.exponential(size=40)
    for method in ("percentile", "BCa"):
        reference = scipy.stats.bootstrap((sample,), np.mean, method=method, n_resamples=999, rng=rng)
        replicates = reference.bootstrap_distribution[:, None]
        if method == "BCa":
            influence = (sample - sample.mean())[:, None] / len(sample)
            low, high = resampling.bca_interval(np.array([sample.mean()]), replicates, influence)
        else:
            low, high = resampling.percentile_interval(replicates)
        np.testing.assert_allclose([low[0], high[0]], reference.confidence_interval, rtol=1e-9)


def test_bca_without_acceleration_would_be_noticed(rng):
    sample = rng.exponential(size=40)
    reference = scipy.stats.bootstrap((sample,), np.mean, n_resamples=999, rng=rng)
    no_skew = np.tile([1.0, -1.0], 20)[:, None]
    low, _ = resampling.bca_interval(np.array([sample.mean()]), reference.bootstrap_distribution[:, None], no_skew)
    assert abs(low[0] - reference.confidence_interval.low) > 1e-3


def test_bootstrap_weights_resample_whole_units(rng):
    weights = resampling.bootstrap_weights(5, 1000, rng)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights * 5, np.round(weights * 5))
    np.testing.assert_allclose(weights.mean(axis=0), 0.2, atol=0.02)


def test_constant_replicates_give_that_constant_and_one_sided_ones_no_interval():
    replicates = np.stack([np.zeros(100), np.ones(100)], axis=1)
    low, high = resampling.bca_interval(np.array([0.0, 0.5]), replicates, np.zeros((4, 2)))
    assert low[0] == high[0] == 0
    assert np.isnan(low[1])
    assert np.isnan(high[1])


def all_swaps_p(a, b):
    result = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: np.abs((x - y).mean(axis=axis)), permutation_type="samples", alternative="greater"
    )
    return result.pvalue


def test_swapping_within_pairs_agrees_with_every_swap_by_scipy(rng):
    a, b = rng.normal(size=(2, 9, 3)) + np.array([0, 0.5, 1.0])
    b[:, 1:] -= 0.8
    design = Paired(9, 20_000, 1, rng)
    observed = np.abs((a - b).mean(axis=0))
    # without the floor at zero, which is for shares
    middle = -np.minimum(a.min(), b.min()) + 1
    count = sum(
        resampling.count_at_least(np.abs(null_a - null_b), observed)
        for null_a, null_b in design.permuted(a + middle, b + middle)
    )
    p = resampling.permutation_p(count, 20_000)
    np.testing.assert_allclose(p, [all_swaps_p(a[:, i], b[:, i]) for i in range(3)], atol=0.01)


def test_reassigning_groups_agrees_with_every_reassignment_by_scipy(rng):
    a, b = rng.random((5, 1)), rng.random((6, 1)) + 0.3
    design = Independent(5, 6, 20_000, 1, rng)
    observed = np.abs(a.mean(axis=0) - b.mean(axis=0))
    count = sum(
        resampling.count_at_least(np.abs(null_a - null_b), observed) for null_a, null_b in design.permuted(a, b)
    )
    reference = scipy.stats.permutation_test(
        (a[:, 0], b[:, 0]), lambda x, y, axis: np.abs(x.mean(axis=axis) - y.mean(axis=axis)), alternative="greater"
    )
    assert resampling.permutation_p(count, 20_000)[0] == pytest.approx(reference.pvalue, abs=0.01)


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_sd_is_that_of_the_permutations(paired, rng):
    a, b = rng.random((2, 30, 4))
    design = Paired(30, 20_000, 1, rng) if paired else Independent(30, 30, 20_000, 1, rng)
    differences = np.concatenate([null_a - null_b for null_a, null_b in design.permuted(a, b)])
    np.testing.assert_allclose(differences.std(axis=0), design.permutation_sd(a, b), rtol=0.05)
    np.testing.assert_allclose(differences.mean(axis=0), 0, atol=0.005)


@pytest.mark.parametrize("paired", [True, False])
def test_influence_is_the_change_of_the_difference_when_a_unit_weighs_more(paired, rng):
    a, b = rng.random((2, 12, 3))
    design = Paired(12, 1, 1, rng) if paired else Independent(12, 12, 1, 1, rng)
    weights = np.full(12, 1 / 12)
    heavier = weights * (1 - 1e-6) + 1e-6 * np.eye(12)[4]
    change_a, change_b = (((heavier - weights) @ side) / 1e-6 / 12 for side in (a, b))
    if paired:
        np.testing.assert_allclose(design.influence(a, b)[4], change_a - change_b, rtol=1e-4)
    else:
        np.testing.assert_allclose(design.influence(a, b)[[4, 16]], [change_a, -change_b], rtol=1e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_replicates_vary_as_means_of_whole_units_do(paired, rng):
    a, b = rng.random((2, 40, 3))
    b += a * paired
    design = Paired(40, 1, 20_000, rng) if paired else Independent(40, 40, 1, 20_000, rng)
    mean_a, mean_b = design.resampled(a, b)
    variance = (a - b).var(axis=0) if paired else a.var(axis=0) + b.var(axis=0)
    np.testing.assert_allclose((mean_a - mean_b).std(axis=0), np.sqrt(variance / 40), rtol=0.05)


def test_p_is_never_zero():
    assert resampling.permutation_p(np.array(0), 99) == 0.01


def clustered_counts(rng, n_simulations=1000, n_units=60, n_experts=6):
    """Counts [simulation, unit, expert] where every unit has habits of its own, and the true shares."""
    truth = statistics.share(np.geomspace(1, 0.05, n_experts))
    habits = rng.dirichlet(25 * truth, size=(n_simulations, n_units))
    return rng.multinomial(rng.poisson(80, size=(n_simulations, n_units)), habits), truth


def coverage(counts, truth, interval):
    inside = []
    for sample in counts:
        low, high = interval(sample.astype(float))
        inside.append((low <= truth) & (truth <= high))
    return np.mean(inside)


def by_unit(rng, method):
    def interval(sample):
        replicates = statistics.share(resampling.bootstrap_weights(len(sample), N_BOOT, rng) @ sample)
        if method == "percentile":
            return resampling.percentile_interval(replicates)
        share = statistics.share(sample.sum(axis=0))
        influence = (sample - sample.sum(axis=1, keepdims=True) * share) / sample.sum()
        return resampling.bca_interval(share, replicates, influence)

    return interval


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_that_resample_units_cover_95_percent(method, rng):
    counts, truth = clustered_counts(rng)
    assert coverage(counts, truth, by_unit(rng, method)) == pytest.approx(0.95, abs=0.025)


def test_an_interval_that_resamples_tokens_fails_the_coverage_test(rng):
    counts, truth = clustered_counts(rng, n_simulations=300)

    def by_token(sample):
        total = sample.sum(axis=0).astype(int)
        return resampling.percentile_interval(
            statistics.share(rng.multinomial(total.sum(), total / total.sum(), N_BOOT))
        )

    assert coverage(counts, truth, by_token) < 0.75


@pytest.mark.parametrize(("method", "covers"), [("recentred", True), ("percentile", False)])
def test_entropy_needs_the_recentred_interval_when_units_are_few(method, covers, rng):
    counts, truth = clustered_counts(rng, n_simulations=400, n_units=25, n_experts=32)

    def interval(sample):
        weights = resampling.bootstrap_weights(len(sample), N_BOOT, rng)
        replicates = statistics.entropy(statistics.share(weights @ sample))
        if method == "percentile":
            return resampling.percentile_interval(replicates)
        observed = statistics.entropy(statistics.share(sample.sum(axis=0)))
        return resampling.recentred_interval(replicates, resampling.bias_corrected(observed, replicates))

    share_covered = coverage(counts, statistics.entropy(truth), interval)
    assert share_covered > 0.9 if covers else share_covered < 0.6
