"""Planted differences come back inside the interval, null ones do not, and position alone is told from channel."""

import numpy as np
import pytest
import scipy.stats

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.studies import channels, routing, sinks
from workbench.studies.contrast import contrast
from workbench.studies.contrast_summary import describe
from workbench.studies.matching import Plan, match
from workbench.studies.matching import sides as side_of
from workbench.studies.run_index import index_of
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


def head0(run: SyntheticTokens, control: str, what: str = "sink", **asked: str):
    result = contrast(run, what, **({"between": "channel", "a": "analysis", "b": "final"} | asked)).sel(control=control)
    return result.isel({str(result["difference"].dims[1]): 0, "layer": 0})


@pytest.mark.parametrize(
    ("planted", "asked", "truth"),
    [
        ({"sink_shift": {"final": 0.03}}, {}, -0.03),
        ({"sink_shift": {"final": 0.03}, "position_slope": 0.03}, {}, -0.03),
        (
            {"effort_shift": {"high": 0.03}},
            {"between": "effort", "a": "low", "b": "high", "channel": "analysis"},
            -0.03,
        ),
        ({"expert_shift": {"final": 0.2}}, {"what": "experts"}, None),
    ],
)
def test_a_planted_difference_is_in_the_interval_of_93_of_100_seeds(planted, asked, truth):
    inside = 0
    for seed in range(100):
        run = planted_tokens(seed=seed, n_layers=1, n_heads=1, n_experts=4, **planted)
        wanted = truth if truth is not None else -0.2 * (1 - run.truth["base"][0, 0])
        cell = head0(run, "position", **asked)
        inside += bool(cell["low"] <= wanted <= cell["high"])
    assert inside >= 93 - 3 * (truth is None), inside  # the share an expert had differs by prompt: its truth is a mean


@pytest.mark.parametrize("control", ["none", "position"])
@pytest.mark.parametrize("what", ["sink", "experts"])
def test_without_a_difference_p_is_uniform_and_the_interval_covers_zero(control, what):
    p, covers = [], []
    for seed in range(100):
        cell = head0(planted_tokens(seed=1000 + seed, n_layers=1, n_heads=1, n_experts=4), control, what)
        p.append(float(cell["p"]))
        covers.append(bool(cell["low"] <= 0 <= cell["high"]))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.9 <= np.mean(covers) <= 0.99, np.mean(covers)


def test_answers_of_one_prompt_taken_for_unrelated_are_too_sure_of_themselves():
    """Negative control: each sequence as a prompt of its own. Under the null its interval misses zero too often."""
    honest = broken = 0
    for seed in range(100):
        run = planted_tokens(seed=seed, n_layers=1, n_heads=1)
        alone = run.sequences.assign(prompt_id=run.sequences["id"])
        twin = SyntheticTokens(run.digest, alone, run.model, run.tokens, run.truth)
        asked = {"between": "task", "a": "t0", "b": "t1", "channel": "analysis"}
        for which, one in (("honest", run), ("broken", twin)):
            cell = head0(one, "none", **asked)
            covers = bool(cell["low"] <= 0 <= cell["high"])
            honest, broken = honest + (covers and which == "honest"), broken + (covers and which == "broken")
    assert honest >= 90
    assert broken <= 85


@pytest.mark.parametrize(
    ("what", "planted"), [("sink", {"position_slope": 0.05}), ("experts", {"expert_position": 0.25})]
)
def test_position_alone_fools_the_naive_comparison_and_not_the_controlled_one(what, planted):
    naive, controlled = 0, 0
    for seed in range(60):
        run = planted_tokens(seed=seed, n_layers=1, n_heads=1, n_experts=4, **planted)
        naive += bool(head0(run, "none", what)["different"])
        controlled += bool(head0(run, "position", what)["different"])
    assert naive >= 57
    assert controlled <= 8, controlled


def test_length_alone_fools_the_naive_comparison_of_efforts():
    naive, controlled = 0, 0
    asked = {"between": "effort", "a": "low", "b": "high", "channel": "analysis"}
    for seed in range(60):
        run = planted_tokens(seed=seed, n_layers=1, n_heads=1, position_slope=0.05)
        naive += bool(head0(run, "none", **asked)["different"])
        controlled += bool(head0(run, "position", **asked)["different"])
    assert naive >= 57
    assert controlled <= 8, controlled


@pytest.fixture(scope="module")
def demo():
    return wb.open_run(DATA / "demo.zarr")


def plain_estimate(run, name: str) -> np.ndarray:
    """Analysis less final in each sequence that has both, averaged over a prompt's sequences, then over prompts."""
    data = run.dataset[[name, "channel", "sequence"]].compute()
    values, channel, sequence = (data[n].values for n in (name, "channel", "sequence"))
    if name == "experts":
        values = np.stack([(values == e).mean(-1) for e in range(16)], -1)
    by_prompt: dict[str, list[np.ndarray]] = {}
    for number, prompt in run.sequences["prompt_id"].items():
        sides = [(sequence == number) & (channel == code) for code in (2, 4)]
        if all(side.any() for side in sides):
            means = [values[:, side].astype(np.float64).mean(1) for side in sides]
            by_prompt.setdefault(prompt, []).append(means[0] - means[1])
    return np.mean([np.mean(own, axis=0) for own in by_prompt.values()], axis=0)


def pooled_estimate(run, name: str) -> np.ndarray:
    """The negative control: all tokens of analysis less all tokens of final."""
    data = run.dataset[[name, "channel"]].compute()
    values = data[name].values
    if name == "experts":
        values = np.stack([(values == e).mean(-1) for e in range(16)], -1)
    means = [values[:, data["channel"].values == code].astype(np.float64).mean(1) for code in (2, 4)]
    return means[0] - means[1]


def test_all_experts_of_the_bundled_run_agree_with_a_plain_estimate_in_both_studies(demo):
    wanted = plain_estimate(demo, "experts")
    assert wanted.shape == (4, 16)
    in_routing = routing.divergence(demo, n_boot=20, n_permutations=200)
    compared = channels.study(demo)["routing_analysis_vs_final"].sel(control="none")
    for one in (in_routing["difference"], compared["difference"]):
        np.testing.assert_allclose(one, wanted, atol=1e-12)
    np.testing.assert_array_equal(in_routing["expert_different"], compared["different"])
    for name in ("low", "high", "p", "q"):
        np.testing.assert_allclose(in_routing[f"difference_{name}"], compared[name], atol=1e-9)
    assert in_routing.attrs["tokens_excluded"] == int(compared["tokens_excluded"]) == 1314
    pooled = pooled_estimate(demo, "experts")
    assert pooled[1, 8] < 0 < wanted[1, 8], "the negative control has the opposite sign"
    assert (np.sign(pooled) != np.sign(wanted)).sum() >= 3


def test_all_heads_of_the_bundled_run_agree_with_a_plain_estimate_in_both_studies(demo):
    wanted = plain_estimate(demo, "sink")
    assert wanted.shape == (4, 8)
    for study, name in ((sinks.study, "analysis_vs_final"), (channels.study, "sinks_analysis_vs_final")):
        result = study(demo)[name]["difference"].sel(control="none")
        np.testing.assert_allclose(result, wanted, atol=1e-9)
    assert not np.allclose(pooled_estimate(demo, "sink"), wanted, atol=1e-3)


@pytest.mark.parametrize("control", ["position", "token"])
def test_weights_of_every_prompt_add_up_to_one_on_a_and_minus_one_on_b_and_cancel_strata(demo, control):
    index = index_of(demo)
    for plan in (Plan("channel", "analysis", "final"), Plan("effort", "medium", "high", "analysis")):
        cells, matching = index.cells("token" if control == "token" else "position"), match(index, plan, control)
        side, weight = side_of(demo, plan, cells), matching.difference * cells.tokens
        used = np.flatnonzero(matching.prompt_weight)
        assert len(used) >= 5
        for s, total in ((0, 1), (1, -1)):
            sums = np.bincount(matching.prompt[side == s], weight[side == s], len(matching.prompt_weight))
            np.testing.assert_allclose(sums[used], total, atol=1e-9)
        # what depends on the stratum alone cancels within each prompt
        strata = np.unique(cells.stratum, return_inverse=True)[1]
        sums = np.bincount(matching.prompt * (strata.max() + 1) + strata, weight)
        np.testing.assert_allclose(sums, 0, atol=1e-9)


def test_an_unpaired_comparison_is_made_only_on_request_and_named_so():
    run = planted_tokens(n_prompts=20)
    own = run.sequences.assign(prompt_id=run.sequences["id"])
    separate = SyntheticTokens(run.digest, own, run.model, run.tokens, run.truth)
    asked = {"between": "effort", "a": "low", "b": "high", "channel": "analysis"}
    with pytest.raises(InputError, match="0 prompts with both"):
        contrast(separate, "sink", **asked)
    result = contrast(separate, "sink", **asked, unpaired=True)
    assert result.attrs["paired"] == 0
    assert result.attrs["summary"].startswith("Unpaired: ")
    assert "Unpaired" in contrast(run, "sink", "task", "t0", "t1", channel="analysis").attrs["summary"]
    assert "Unpaired" not in contrast(run, "sink", **asked).attrs["summary"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"between": "channel", "a": "analysis", "b": "nonsense"}, "nonsense"),
        ({"between": "effort", "a": "low", "b": "high"}, "needs a channel"),
        ({"between": "effort", "a": "low", "b": "huge", "channel": "final"}, "huge"),
        ({"between": "channel", "a": "analysis", "b": "commentary"}, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared(asked, message):
    with pytest.raises(InputError, match=message):
        contrast(planted_tokens(n_prompts=3), "sink", **asked)
    with pytest.raises(InputError, match="choose from"):
        contrast(planted_tokens(n_prompts=3), "nonsense", "channel", "analysis", "final")


def test_nothing_is_called_different_whose_interval_includes_zero():
    for seed in range(20):
        result = contrast(planted_tokens(seed=seed, sink_shift={"final": 0.01}), "sink", "channel", "analysis", "final")
        assert not (result["different"] & (result["low"] * result["high"] <= 0)).any()


def test_an_expert_that_a_layer_does_not_have_is_absent_and_in_no_family_of_tests():
    """Layer 1 has 3 of 8 experts: its other cells are missing, and correct nothing that was tested."""
    run = planted_tokens(seed=1, n_prompts=20, expert_shift={"final": 0.3})
    run.tokens["experts"][1] %= 3
    pruned = SyntheticTokens(run.digest, run.sequences, {**run.model, "layer_experts": [8, 3]}, run.tokens, run.truth)
    full, own = (contrast(r, "experts", "channel", "analysis", "final").sel(control="none") for r in (run, pruned))
    exists = np.arange(8) < np.array([8, 3])[:, None]
    for name in ("difference", "low", "high", "p", "q", "mean_a", "mean_b", "bound"):
        assert np.array_equal(np.isfinite(own[name].values), exists), name
        assert np.isfinite(full[name].values).all(), "the negative control does not state which experts there are"
    for name in ("difference", "p", "size", "noise"):
        there = exists if own[name].ndim == 2 else slice(None)
        np.testing.assert_allclose(own[name].values[there], full[name].values[there], rtol=1e-12)
    assert (own["q"].values[exists] <= full["q"].values[exists]).all()
    assert own["q"].values[exists].sum() < full["q"].values[exists].sum(), "a family with cells that cannot differ"
    assert "of 11 cells differ" in own.attrs["summary"]
    assert "of 16 cells differ" in full.attrs["summary"]


def test_the_summary_follows_the_verdicts_of_the_result() -> None:
    result = contrast(planted_tokens(seed=1, sink_shift={"final": 0.05}), "sink", "channel", "analysis", "final")
    n = int(result["different"].sel(control="none").sum())
    assert n > 0
    assert f"Within prompts ({int(result['prompts'][0])} prompts, " in result.attrs["summary"]
    assert f"{n} of {result['different'][0].size} cells differ" in describe(result)
    changed = result.assign(different=result["different"] & False)  # negative control
    assert f"0 of {result['different'][0].size} cells differ" in describe(changed)
    assert "a difference beyond" in describe(changed)
