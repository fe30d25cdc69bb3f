"""Information and co-activation against scikit-learn and planted dependence; by chance there is none."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import mutual_info_score

import workbench as wb
from tests.conftest import DATA
from workbench.studies import specialization as study
from workbench.studies.comparison import sum_by
from workbench.studies.specialization import coactivation, mutual_information, specialization
from workbench.studies.synthetic import planted_run


def test_mutual_information_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.integers(0, 30, (5, 7))
        ours = mutual_information(table)[0] * np.log(2)
        assert ours == pytest.approx(mutual_info_score(None, None, contingency=table))


def test_the_correction_removes_the_bias_of_independent_pairs():
    rng = np.random.default_rng(1)
    plug_in, corrected = [], []
    for _ in range(200):
        table = np.histogram2d(*rng.integers(0, 8, (2, 400)), bins=8)[0]
        pair = mutual_information(table)
        plug_in.append(pair[0])
        corrected.append(pair[1])
    assert np.mean(plug_in) > 0.05
    assert abs(np.mean(corrected)) < 0.01


@pytest.mark.parametrize("axis", ["channel", "effort", "task"])
def test_without_dependence_p_is_uniform(axis):
    p = []
    for seed in range(200):
        run = planted_run(
            seed=seed, n_prompts=12, n_layers=1, n_experts=6, lengths={"prompt": 30, "analysis": 30, "final": 30}
        )
        p.append(float(specialization(run, axis, n_permutations=99, seed=seed)["p"][0]))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.005


def test_prompts_without_an_answer_do_not_hide_information_on_the_task():
    """Two fifths of the prompts have no written token. Negative control: with them, p is near 1 without dependence."""
    p, blind = [], []
    for seed in range(40):
        run = planted_run(
            seed=seed, n_prompts=20, n_layers=1, n_experts=6, lengths={"prompt": 30, "analysis": 30, "final": 30}
        )
        rng = np.random.default_rng(seed)
        prompts = run.sequences["prompt_id"]
        unwritten = prompts.isin(rng.choice(prompts.unique(), 8, replace=False)).to_numpy()
        counts = run.summaries["expert_count"].transpose("sequence", "channel", "layer", "expert").copy(deep=True)
        written = [str(c) in ("analysis", "final") for c in counts["channel"].values]
        counts.values[np.ix_(unwritten, written)] = 0
        partial = dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts})
        p.append(float(specialization(partial, "task", n_permutations=99, seed=seed)["p"][0]))
        number = np.unique(prompts, return_inverse=True)[1]
        tasks = (run.sequences["task"] == run.sequences["task"].iloc[0]).to_numpy()
        sums = counts.values[:, written].sum(1)
        by = np.stack([sum_by(np.where((tasks == side)[:, None, None], sums, 0), number) for side in (True, False)], 1)
        there = by.any((2, 3))
        by = np.nan_to_num(study.share(by.astype(float)))
        observed = study._spread(study._mean(by, there))
        shuffled = np.concatenate([t for _, t in study._shuffled(by, there, "task", 99, rng)])
        blind.append(float(np.mean([study._spread(t) >= observed for t in shuffled])))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.005
    assert np.mean(blind) > 0.9, "negative control"


@pytest.mark.parametrize("axis", ["channel", "task"])
def test_a_layer_without_counts_leaves_the_others_as_they_are(axis):
    run = planted_run(seed=3, n_prompts=12, n_layers=3, channel_shift={"final": {1: 0.5}})
    counts = run.summary("expert_count").copy(deep=True)
    counts.loc[{"layer": 2}] = 0
    lacking = dataclasses.replace(run, summaries={**run.summaries, "expert_count": counts})
    complete, partial = (specialization(one, axis, n_permutations=99) for one in (run, lacking))
    for name in ("label_information", "nmi", "p"):
        np.testing.assert_allclose(partial[name][:2], complete[name][:2])
        assert np.isnan(partial[name][2]), "negative control: it was zero for every layer"
    assert np.isfinite(complete["p"]).all()


def test_planted_dependence_is_found_where_it_is():
    run = planted_run(
        seed=3, n_prompts=20, n_layers=3, channel_shift={"final": {1: 0.5}}, effort_shift={"high": {2: 0.5}}
    )
    channel, effort = specialization(run, "channel"), specialization(run, "effort")
    assert channel["q"][1] < 0.05
    assert int(channel["nmi"].values.argmax()) == 1
    assert int(effort["nmi"].values.argmax()) == 2
    assert effort["q"][2] < 0.05


def test_coactivation_is_that_of_the_tokens():
    run = wb.open_run(DATA / "demo.zarr")
    result = coactivation(run)
    data = run.dataset[["experts", "channel"]].compute()
    final = data["experts"].values[2, data["channel"].values == 4]
    i, j = 3, 7
    with_i = (final == i).any(-1)
    assert float(result["given"].sel(channel="final")[2, i, j]) == pytest.approx((final[with_i] == j).any(-1).mean())
    assert np.nanmax(np.abs(np.diagonal(result["given"].values, axis1=-2, axis2=-1) - 1)) < 1e-9
