"""Planted differences come back inside the interval, null ones do not, and position alone is told from channel."""

import numpy as np
import pytest
import scipy.stats

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.studies import contrast as module
from workbench.studies.contrast import contrast
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


def head0(run: SyntheticTokens, control: str, what: str = "sink", **asked: str):
    found = contrast(run, what, **({"between": "channel", "a": "analysis", "b": "final"} | asked)).sel(control=control)
    return found.isel({str(found["difference"].dims[1]): 0, "layer": 0})


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
    for seed in range(200):
        cell = head0(planted_tokens(seed=1000 + seed, n_layers=1, n_heads=1, n_experts=4), control, what)
        p.append(float(cell["p"]))
        covers.append(bool(cell["low"] <= 0 <= cell["high"]))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.91 <= np.mean(covers) <= 0.985, np.mean(covers)


def test_answers_of_one_prompt_taken_for_unrelated_are_too_sure_of_themselves():
    """The broken twin: each sequence as a prompt of its own. Without a difference its interval misses zero too often."""
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


def test_the_naive_mean_is_that_of_the_tokens():
    run = wb.open_run(DATA / "demo.zarr")
    data = run.dataset[["sink", "experts", "channel"]].compute()
    found = contrast(run, "sink", "channel", "analysis", "final").sel(control="none")
    for name, code in (("mean_a", 2), ("mean_b", 4)):
        np.testing.assert_allclose(
            found[name], data["sink"].astype("float64")[:, data["channel"] == code].mean("token"), rtol=1e-9
        )
    load = contrast(run, "experts", "channel", "analysis", "final").sel(control="none")
    experts = data["experts"].values[:, data["channel"].values == 4]
    counted = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in experts])
    np.testing.assert_allclose(load["mean_b"], counted / counted.sum(-1, keepdims=True))
    np.testing.assert_allclose(load["mean_b"].sum("expert"), 1)


def test_strata_are_narrow_and_full():
    run = planted_tokens(n_prompts=30)
    sides = module._Sides(run, "channel", "analysis", "final", None, None, None)
    strata = module._strata(run, sides, "position")
    (block,) = run.blocks()
    side, stratum = sides(block), strata[block["position"]]
    for number in range(strata.max() + 1):
        here = np.flatnonzero(strata == number)
        assert len(here) <= max(module.SLACK, module.WIDEST * (here[0] + 1) - here[0])
        for s in (0, 1):
            prompts = sides.prompt[block["sequence"][(side == s) & (stratum == number)]]
            assert len(set(prompts)) >= module.LEAST_PROMPTS


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"between": "channel", "a": "analysis", "b": "nonsense"}, "nonsense"),
        ({"between": "effort", "a": "low", "b": "high"}, "needs a channel"),
        ({"between": "effort", "a": "low", "b": "huge", "channel": "final"}, "huge"),
        ({"between": "channel", "a": "analysis", "b": "commentary"}, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared(asked, said):
    with pytest.raises(InputError, match=said):
        contrast(planted_tokens(n_prompts=3), "sink", **asked)
    with pytest.raises(InputError, match="choose from"):
        contrast(planted_tokens(n_prompts=3), "nonsense", "channel", "analysis", "final")


def test_nothing_is_called_different_whose_interval_includes_zero():
    for seed in range(20):
        found = contrast(planted_tokens(seed=seed, sink_shift={"final": 0.01}), "sink", "channel", "analysis", "final")
        assert not (found["different"] & (found["low"] * found["high"] <= 0)).any()
