"""Load by cell: the definitions, missing cells, intervals that hold the truth, and the study as a whole."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from workbench import studies
from workbench.errors import InputError
from workbench.studies import result, statistics
from workbench.studies.routing import load, study
from workbench.studies.synthetic import planted_run

FAST = {"n_boot": 200, "n_permutations": 300}


@pytest.fixture(scope="module")
def run():
    return planted_run(n_prompts=12, channel_shift={"final": {2: 0.4}}, effort_shift={"high": {1: 0.4}})


@pytest.fixture(scope="module")
def loaded(run):
    return load(run, n_boot=200)


def test_load_is_the_share_of_slots_of_a_cells_tokens(run, loaded):
    counts = run.summary("expert_count").values
    high = run.sequences.effort == "high"
    analysis = list(run.summary("tokens").channel.values).index("analysis")
    expected = counts[high, analysis].sum(axis=0)
    cell = loaded.sel(channel="analysis", effort="high")
    np.testing.assert_allclose(cell.share, expected / expected.sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(cell.gate_share, cell.share, atol=1e-6)
    np.testing.assert_allclose(cell.effective_experts, np.exp(cell.entropy))
    np.testing.assert_allclose(cell.entropy_normalised, cell.entropy / np.log(16))
    assert cell.tokens == run.summary("tokens").values[high, analysis].sum()
    assert cell.prompts == cell.sequences == 12


def test_efforts_are_in_order_of_effort(loaded):
    assert list(loaded.effort.values) == ["low", "medium", "high"]


def test_a_cell_without_tokens_is_missing_and_an_unused_expert_is_zero():
    run = planted_run(n_prompts=12, lengths={"analysis": 3, "final": 200}, n_experts=32)
    loaded = load(run, n_boot=50)
    empty = loaded.sel(channel="commentary")
    for name, values in empty.data_vars.items():
        if name in ("tokens", "sequences", "prompts"):
            assert (values == 0).all()
        else:
            assert np.isnan(values).all(), name
    few = loaded.sel(channel="analysis", effort="low")
    assert few.never_selected.sum() == (few.share == 0).sum() > 0
    unused = few.share.values == 0
    assert (few.share_low.values[unused] == 0).all()
    assert (few.share_high.values[unused] > 0.01).all(), "12 prompts that do not use an expert are not proof"


def test_one_prompt_gives_a_load_without_an_interval():
    loaded = load(planted_run(n_prompts=1), n_boot=50)
    cell = loaded.sel(channel="final", effort="low")
    assert np.isfinite(cell.share).all()
    assert np.isnan(cell.share_low).all()
    assert np.isnan(cell.entropy_high).all()


def test_samples_of_one_prompt_are_one_unit():
    run = planted_run(n_prompts=40, concentration=8.0)
    pooled = load(run, by=("channel",), channels=("analysis",), n_boot=300)
    assert (pooled.prompts.item(), pooled.sequences.item()) == (40, 120)
    alone = {name: array.assign_coords(prompt_id=array.coords["id"].variable) for name, array in run.summaries.items()}
    unrelated = load(dataclasses.replace(run, summaries=alone), by=("channel",), channels=("analysis",), n_boot=300)
    assert unrelated.prompts.item() == 120
    # the negative control, in which the samples of a prompt count as unrelated, is too sure of itself
    width, too_narrow = (float((ds.share_high - ds.share_low).mean()) for ds in (pooled, unrelated))
    assert width > 1.3 * too_narrow


def test_a_channel_named_twice_counts_once(run):
    once, twice = (load(run, by=(), channels=names, n_boot=50) for names in (("final",), ("final", "final")))
    assert once.tokens == twice.tokens


def test_what_by_does_not_name_is_pooled(run):
    everything = load(run, by=(), channels=("analysis", "final"), n_boot=50)
    counts = run.summary("expert_count").sel(channel=["analysis", "final"]).sum(("sequence", "channel"))
    np.testing.assert_allclose(everything.share, statistics.share(counts.values))
    by_task = load(run, by=("task", "effort"), channels=("final",), n_boot=50)
    assert by_task.share.dims == ("task", "effort", "layer", "expert")
    assert int(by_task.tokens.sum()) == int(run.summary("tokens").sel(channel="final").sum())


def test_a_cell_keeps_its_interval_whatever_else_is_asked_for(loaded, run):
    alone = load(run, channels=("final",), n_boot=200)
    xr.testing.assert_equal(alone.sel(channel="final"), loaded.sel(channel="final"))


@pytest.mark.parametrize("interval", ["bca", "percentile"])
def test_intervals_of_share_and_entropy_hold_the_truth_95_percent_of_the_time(interval):
    run = planted_run(seed=9, n_prompts=300, n_layers=250, n_experts=8, efforts=("low",), lengths={"final": 60})
    results = load(run, channels=("final",), n_boot=800, interval=interval).sel(channel="final", effort="low")
    truth = run.truth.sel(channel="final", effort="low").values
    covered = (results.share_low.values <= truth) & (truth <= results.share_high.values)
    assert covered.mean() == pytest.approx(0.95, abs=0.025)
    entropy = statistics.entropy(truth)
    covered = (results.entropy_low.values <= entropy) & (entropy <= results.entropy_high.values)
    assert covered.mean() == pytest.approx(0.95, abs=0.025)
    assert abs((results.entropy_corrected.values - entropy).mean()) < abs((results.entropy.values - entropy).mean())


def test_bca_of_a_share_is_scipys_where_every_prompt_has_as_many_tokens():
    run = planted_run(seed=5, n_prompts=25, n_layers=1, efforts=("low",), concentration=6.0)
    counts = run.summary("expert_count").copy(deep=True)
    slots = np.random.default_rng(0).multinomial(400, np.random.default_rng(1).dirichlet(np.full(16, 0.4), size=25))
    counts.loc[{"channel": "final"}] = slots[:, None]
    results = load(
        dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts}),
        channels=("final",),
        n_boot=20_000,
    ).sel(channel="final", effort="low", layer=0)
    for expert in range(4):
        share = slots[:, expert] / 400
        reference = scipy.stats.bootstrap((share,), np.mean, n_resamples=20_000, rng=3).confidence_interval
        np.testing.assert_allclose([results.share_low[expert], results.share_high[expert]], reference, rtol=0.03)


def test_limits_of_effective_experts_stay_between_one_and_all():
    results = load(planted_run(n_prompts=5, n_layers=40, n_experts=4), n_boot=100)
    known = np.isfinite(results.effective_experts_high.values)
    assert (results.effective_experts_low.values[known] >= 1).all()
    # near evenness the correction of the bias alone would go beyond
    assert (results.effective_experts_high.values[known] <= 4 + 1e-12).all()
    assert np.isclose(results.effective_experts_high.values[known], 4).any()


def test_every_variable_states_what_it_is(loaded):
    for name, variable in loaded.data_vars.items():
        assert {"long_name", "units", "definition"} <= set(variable.attrs), name
    assert loaded.share_low.attrs["ci"].startswith("95 %")
    assert {"run_digest", "workbench_version", "seed", "parameters", "method"} <= set(loaded.attrs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": ("layer",)}, "give each of channel, effort and task at most once"),
        ({"by": ("effort", "effort")}, "at most once"),
        ({"channels": ("thought",)}, "channel 'thought' is not in this run"),
    ],
)
def test_cells_that_do_not_exist_are_refused(run, arguments, message):
    with pytest.raises(InputError, match=message):
        load(run, **arguments)


def test_a_run_without_sequences_is_refused(run):
    empty = {name: array.isel(sequence=slice(0)) for name, array in run.summaries.items()}
    with pytest.raises(InputError, match="no sequence yet"):
        load(dataclasses.replace(run, summaries=empty))


def test_the_study_finds_what_was_planted_and_calls_nothing_else_different(run):
    results = studies.run_study("routing", run, **FAST)
    assert [name for name in results if "special" not in name] == [
        "load",
        "analysis_vs_final",
        "low_vs_high_in_prompt",
        "low_vs_high_in_analysis",
        "low_vs_high_in_final",
    ]
    different = {name: np.flatnonzero(results[name].different).tolist() for name in results if "jsd" in results[name]}
    assert different == {
        "analysis_vs_final": [2],
        "low_vs_high_in_prompt": [],
        "low_vs_high_in_analysis": [1],
        "low_vs_high_in_final": [1],
    }


def test_the_study_takes_the_widest_efforts_that_have_pairs_and_states_what_it_left_out():
    run = planted_run(n_prompts=6)
    summaries = {name: array.copy(deep=True) for name, array in run.summaries.items()}
    low = np.flatnonzero(run.sequences.effort == "low")
    for array in summaries.values():
        array.loc[{"channel": "analysis", "sequence": low}] = 0
        array.loc[{"channel": "final"}] = 0
    results = study(dataclasses.replace(run, summaries=summaries), **FAST)
    assert "medium_vs_high_in_analysis" in results
    assert "analysis_vs_final" not in results
    assert "Skipped: channels, as fewer than two prompts have tokens of both." in results["load"].summary


def test_a_run_of_one_effort_is_studied_without_efforts():
    results = study(planted_run(n_prompts=6, efforts=("medium",)), **FAST)
    assert [name for name in results if "special" not in name] == ["load", "analysis_vs_final"]


def test_a_run_of_one_prompt_is_described_and_nothing_is_compared():
    results = study(planted_run(n_prompts=1), **FAST)
    assert [name for name in results if "special" not in name] == ["load"]
    assert results["load"].summary.count("Skipped: ") == 4


def test_an_unknown_study_is_refused():
    with pytest.raises(InputError, match=r"study or experiment 'sinkz' does not exist; choose from routing"):
        studies.run_study("sinkz", None)


def test_studies_are_imported_without_torch_and_without_weight():
    code = (
        "import sys; import workbench as wb; wb.studies; light = {'xarray', 'pandas', 'scipy'} & set(sys.modules); "
        "wb.studies.routing.load; print(light, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "False"]


def test_the_summary_names_what_is_not_controlled(run):
    text = result.summary(study(run, **FAST))
    assert "analysis comes before final" in text.lower()
    assert "prompt channel is the matched comparison" in text.lower().replace("\n", " ")
    assert run.digest in text
