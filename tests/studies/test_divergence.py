"""Comparisons of two conditions: planted differences are found, their absence is not, and intervals hold the truth."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from workbench.errors import InputError
from workbench.studies import divergence as module
from workbench.studies.comparison import compare, conditions
from workbench.studies.resampling import Paired, count_at_least, permutation_p
from workbench.studies.routing import divergence
from workbench.studies.statistics import false_discovery, jensen_shannon, share
from workbench.studies.synthetic import planted_run

FAST = {"n_boot": 300, "n_permutations": 500}
# every layer of a synthetic run is a draw of its own, so layers serve as simulations
UNEQUAL = {"analysis": 300, "final": 15}


@pytest.fixture(scope="module")
def null_run():
    return planted_run(seed=1, n_layers=200, n_experts=8, n_prompts=40, lengths=UNEQUAL, efforts=("low", "high"))


COMPARISONS = {
    "channel": {},
    "effort": {"a": "low", "b": "high", "channel": "analysis"},
    "task": {"a": "recall", "b": "sums", "channel": "final", "effort": "low"},
}


@pytest.mark.parametrize("between", COMPARISONS)
def test_p_is_uniform_where_nothing_differs(null_run, between):
    result = divergence(null_run, between, **COMPARISONS[between], **FAST)
    assert scipy.stats.kstest(result.p, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(result.difference_p.values[:, 0], "uniform").pvalue > 0.01


@pytest.mark.parametrize("between", COMPARISONS)
def test_nothing_is_called_different_where_nothing_differs(null_run, between):
    result = divergence(null_run, between, **COMPARISONS[between], **FAST)
    assert not result.different.any()
    assert result.expert_different.mean() < 0.01
    np.testing.assert_allclose(result.q, false_discovery(result.p.values))
    np.testing.assert_allclose(result.difference_q, false_discovery(result.difference_p.values))
    assert (result.difference_p_family >= result.difference_p).all()
    assert "No difference shown in any layer" in result.summary


def test_p_stays_calibrated_with_few_tokens_on_one_side_where_the_divergence_itself_is_not():
    run = planted_run(n_layers=400, n_experts=32, n_prompts=12, efforts=("low",), lengths={"analysis": 300, "final": 5})
    result = divergence(run, n_boot=10, n_permutations=400)
    assert float((result.p < 0.05).mean()) < 0.075
    # the negative control: read the p-value off the null of the divergence
    assert float((result.jsd > result.null_high).mean()) > 3 * 0.025


def test_token_sums_swapped_within_pairs_are_not_calibrated(null_run):
    """The negative control: pooling tokens before swapping mixes long analysis with short final."""
    tokens = null_run.summary("tokens")
    pair = compare(null_run.summary("expert_count"), tokens, "channel", conditions("channel", "analysis", "final"))
    swap = np.random.default_rng(0).integers(0, 2, size=(500, len(pair.a.counts))).astype(float)
    p = []
    for layer in range(100):
        a, b = pair.a.counts[:, layer].astype(float), pair.b.counts[:, layer].astype(float)
        null = jensen_shannon(share(swap @ a + (1 - swap) @ b), share((1 - swap) @ a + swap @ b))
        p.append(permutation_p(count_at_least(null, jensen_shannon(share(a.sum(0)), share(b.sum(0)))), 500))
    assert scipy.stats.kstest(p, "uniform").pvalue < 1e-6


def test_tokens_taken_for_units_see_differences_that_are_not_there():
    """The negative control: prompts of two groups differ in their habits, tokens within a prompt do not."""
    run = planted_run(n_layers=60, n_experts=8, n_prompts=24, concentration=10.0)
    sides = conditions("task", "recall", "sums", channel="analysis", effort="high")
    groups = compare(run.summary("expert_count"), run.summary("tokens"), "task", sides)
    false_positives = []
    for layer in range(60):
        table = np.stack([groups.a.counts[:, layer].sum(axis=0), groups.b.counts[:, layer].sum(axis=0)])
        false_positives.append(scipy.stats.chi2_contingency(table + 1).pvalue < 0.05)
    assert np.mean(false_positives) > 0.5
    by_prompt = divergence(run, "task", "recall", "sums", channel="analysis", effort="high", **FAST)
    assert float((by_prompt.p < 0.05).mean()) < 0.15


@pytest.fixture(scope="module")
def planted():
    return planted_run(
        seed=3,
        n_layers=120,
        n_experts=8,
        n_prompts=60,
        efforts=("low", "high"),
        channel_shift={"final": dict.fromkeys(range(60), 0.3)},
    )


def test_planted_divergence_is_found_and_its_size_covered(planted):
    result = divergence(planted, n_boot=400, n_permutations=500)
    truth = jensen_shannon(
        *(planted.truth.sel(channel=channel).mean("effort").values for channel in ("analysis", "final"))
    )
    moved = truth > 0.005
    assert 40 <= moved.sum() <= 60
    assert result.different.values[moved].all()
    assert not result.different.values[60:].any()
    assert result.excess.values[60:].mean() == pytest.approx(0, abs=2e-4)
    covered = (result.excess_low.values <= truth) & (truth <= result.excess_high.values)
    assert covered[moved].mean() == pytest.approx(0.95, abs=0.06)
    assert covered.mean() > 0.93


def test_intervals_of_the_difference_cover_95_percent(planted):
    result = divergence(planted, n_boot=400, n_permutations=10)
    truth = planted.truth.sel(channel="analysis") - planted.truth.sel(channel="final")
    truth = truth.mean("effort").values
    covered = (result.difference_low.values <= truth) & (truth <= result.difference_high.values)
    assert covered.mean() == pytest.approx(0.95, abs=0.025)


def test_two_changed_experts_among_many_cells_are_found_alone():
    run = planted_run(seed=2, n_layers=12, n_experts=32, n_prompts=40, efforts=("low",))
    counts = run.summary("expert_count").copy(deep=True)
    final = counts.sel(channel="final", layer=7).values
    rare, _, *_, busy = np.argsort(final.sum(axis=0))
    stolen = final[:, busy] // 2
    final[:, busy] -= stolen
    final[:, rare] += stolen
    run = dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts})
    result = divergence(run)
    assert set(zip(*np.nonzero(result.expert_different.values), strict=True)) == {(7, busy), (7, rare)}
    assert (result.difference_p_family.values[7, [busy, rare]] < 0.001).all()
    assert np.flatnonzero(result.different).tolist() == [7]
    assert f"layer 7 expert {busy}: " in result.summary


def test_nothing_whose_interval_includes_zero_is_called_different(monkeypatch):
    run = planted_run(channel_shift={"final": {1: 0.5}})
    assert divergence(run, **FAST).expert_different.any()
    monkeypatch.setattr(module, "mean_interval", lambda *_: (np.full(16, -1.0), np.full(16, 1.0)))
    result = divergence(run, interval="bca", **FAST)
    assert (result.difference_q < 0.05).any()
    assert not result.expert_different.any()
    assert "Used differently: 0 of 64" in result.summary


def test_effort_is_compared_within_prompts_and_in_the_prompt_channel_it_changes_nothing():
    run = planted_run(n_prompts=40, effort_shift={"high": {1: 0.4}})
    options = {"between": "effort", "a": "low", "b": "high", **FAST}
    generated = divergence(run, channel="analysis", **options)
    control = divergence(run, channel="prompt", **options)
    np.testing.assert_array_equal(generated.different, [False, True, False, False])
    assert not control.different.any()


def test_every_sample_of_a_prompt_is_the_same_unit():
    run = planted_run(n_prompts=10, efforts=("low", "high"))
    assert divergence(run, **FAST).rests_on == "10 prompts"
    unnamed = {
        name: array.assign_coords(prompt_id=("sequence", np.full(20, "", dtype=object)))
        for name, array in run.summaries.items()
    }
    assert divergence(dataclasses.replace(run, summaries=unnamed), **FAST).rests_on == "20 prompts"


def test_prompts_without_one_of_the_efforts_are_left_out():
    run = planted_run(n_prompts=20, efforts=("low", "high"))
    has_pair = (run.sequences.effort != "low") | (run.sequences.index < 20)
    fewer = {name: array.isel(sequence=np.flatnonzero(has_pair)) for name, array in run.summaries.items()}
    complete = {name: array.isel(sequence=slice(20)) for name, array in run.summaries.items()}
    options = {"between": "effort", "a": "low", "b": "high", "channel": "final", **FAST}
    result, expected = (divergence(dataclasses.replace(run, summaries=s), **options) for s in (fewer, complete))
    assert result.rests_on == "10 prompts"
    xr.testing.assert_equal(result, expected)


def test_sequences_without_one_of_the_channels_are_left_out():
    run = planted_run(n_prompts=20, efforts=("low", "high"))
    low = np.flatnonzero(run.summary("tokens").effort == "low")
    summaries = {name: array.copy(deep=True) for name, array in run.summaries.items()}
    for array in summaries.values():
        array.loc[{"channel": "analysis", "sequence": low}] = 0
    result = divergence(dataclasses.replace(run, summaries=summaries), **FAST)
    high = divergence(run, effort="high", **FAST)
    assert result.tokens_b == high.tokens_b
    np.testing.assert_allclose(result.jsd, high.jsd)


def test_a_layer_without_counts_is_missing_and_never_different():
    run = planted_run(channel_shift={"final": {1: 0.3}})
    counts = run.summary("expert_count").copy(deep=True)
    counts.loc[{"layer": 1}] = 0
    result = divergence(dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts}), **FAST)
    for name in ("jsd", "p", "q", "excess_low", "difference_p", "difference_q", "difference_p_family"):
        assert np.isnan(result[name].sel(layer=1)).all(), name
        assert np.isfinite(result[name].drop_sel(layer=1)).all(), name
    assert not result.different.sel(layer=1)


def test_the_seed_decides_and_is_recorded():
    run = planted_run()
    once, again, other = (divergence(run, seed=seed, **FAST) for seed in (5, 5, 6))
    xr.testing.assert_identical(once, again)
    assert not np.array_equal(once.null_mean, other.null_mean)
    assert once.seed == 5
    assert '"n_permutations": 500' in once.parameters


def test_percentile_intervals_are_an_option():
    run = planted_run()
    assert not np.array_equal(
        divergence(run, **FAST).difference_low, divergence(run, interval="percentile", **FAST).difference_low
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": "thought"}, r"channel 'thought' is not in this run; it has frame"),
        ({"b": "analysis"}, r"cannot be compared with itself"),
        ({"between": "layer"}, r"choose channel, effort or task"),
        ({"channel": "final"}, r"cannot be fixed"),
        ({"between": "effort", "a": "low", "b": "high"}, r"needs the channel"),
        ({"between": "effort", "a": "low", "b": "max", "channel": "final"}, r"effort 'max' is not in this run"),
        ({"task": "sorting"}, r"task 'sorting' is not in this run; it has recall, sums"),
        ({"interval": "normal"}, r"choose t, bca or percentile"),
        ({"n_permutations": 0}, r"at least 1 permutation"),
        ({"n_boot": 0}, r"at least 1 bootstrap replicate"),
        ({"b": "commentary"}, r"0 prompts with both, and at least 2 are needed"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        divergence(planted_run(n_prompts=4), **arguments)
    assert "\n" not in str(error.value)


def test_swaps_of_shares_stay_distributions():
    a, b = np.random.default_rng(0).dirichlet(np.ones(6), size=(2, 9))
    for null_a, null_b in Paired(9, 100, 1, np.random.default_rng(1)).permuted(a, b):
        np.testing.assert_allclose(null_a.sum(axis=1), 1)
        np.testing.assert_allclose(null_b.sum(axis=1), 1)
        assert min(null_a.min(), null_b.min()) >= 0
