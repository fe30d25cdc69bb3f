"""The comparison of two runs: planted agreement is in its interval, unrelated routers agree by load alone.

Also tests `workbench.studies.compare_efforts`, the differences by effort, and the effect on log-probability of
`workbench.studies.routing_agreement_runs`.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from workbench.errors import InputError
from workbench.figures import compare as figures
from workbench.harmony.labels import CHANNELS
from workbench.runs.schema import Activation
from workbench.studies import compare, routing_agreement_runs, run_study
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


def altered(run: SyntheticTokens, share: float, seed: int = 0) -> SyntheticTokens:
    """The same tokens, a share of whose choices another router made at random."""
    rng = np.random.default_rng(seed)
    experts = run.tokens["experts"].copy()
    hit = rng.random(experts.shape) < share
    experts[hit] = rng.integers(0, run.model["num_experts"], int(hit.sum()))
    tokens = dict(run.tokens) | {"experts": experts}
    return SyntheticTokens("other", run.sequences, run.model, tokens, run.truth)


def complete(run: SyntheticTokens) -> SyntheticTokens:
    n = len(run.tokens["channel"])
    rng = np.random.default_rng(0)
    tokens = dict(run.tokens) | {"id": np.arange(n), "logprob": rng.normal(size=n)}
    return SyntheticTokens(run.digest, run.sequences, run.model, tokens, run.truth)


@pytest.fixture
def only_agreement(monkeypatch):
    """A context in which the study leaves out the tests of differences, on which agreement does not depend."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(compare, "_differences", lambda *_: ({}, []))
            yield

    return context


def test_planted_agreement_between_two_runs_is_in_its_interval(only_agreement):
    inside = 0
    with only_agreement():
        for seed in range(100):
            run = complete(planted_tokens(seed=seed, n_layers=1, n_experts=8, n_heads=1, n_prompts=25))
            result = compare.study(run, altered(run, 0.4, seed))["agreement"].sel(channel="analysis").isel(layer=0)
            inside += bool(result["agreement_low"] <= 0.6 + 0.4 / 8 <= result["agreement_high"])
    assert inside >= 93
    same = compare.study(run, run)
    shares = [same["agreement"][f"agreement{end}"].dropna("channel") for end in ("", "_low", "_high")]
    assert (shares[0] == 1).all()
    assert (shares[1] < 0.9).all(), "25 prompts that agree are not proof of all"
    assert (shares[2] == 1).all()
    for name in ("logprob_in_analysis", "sinks_in_final", "routing_in_prompt"):
        assert not same[name]["difference"].any()
        assert not same[name]["different"].any()


def test_unrelated_routers_agree_by_load_alone():
    run = complete(planted_tokens(n_layers=1, n_experts=8, n_heads=1, n_prompts=60))
    result = compare.study(run, altered(run, 1.0))["agreement"].sel(channel="analysis").isel(layer=0)
    assert abs(float(result["beyond_load"])) < 0.03
    assert float(result["agreement"]) > 0.1


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_the_effect_on_log_probability_is_a_mean_over_prompts():
    """Log-probabilities differ by 1 in one prompt, which has half of all sequences, and by 0.1 in 19 others.

    Null: the same run. Negative control: the mean over all tokens. A run without log-probabilities has no such line.
    """
    run = complete(planted_tokens(n_layers=1, n_experts=8, n_heads=1, n_prompts=38, efforts=["low"]))
    number = np.maximum(np.arange(38) - 18, 0)
    table = run.sequences.assign(prompt_id=[f"p{n}" for n in number])
    by = np.where(number == 0, 1.0, 0.1)[run.tokens["sequence"]]
    sign = np.where(np.arange(len(by)) % 2, 1, -1)  # a mean of a − b would be about 0

    def with_logprob(values: np.ndarray) -> SyntheticTokens:
        tokens = dict(run.tokens) | {"logprob": values, "router_logits": np.zeros((1, len(values), 8))}
        return SyntheticTokens(run.digest, table, run.model, tokens, run.truth)

    a, b = with_logprob(run.tokens["logprob"]), with_logprob(run.tokens["logprob"] + sign * by)
    result = routing_agreement_runs.study(a, b)["agreement"]
    assert float(result["logprob_effect"]) == pytest.approx((1 + 0.1 * 19) / 20)
    assert np.abs(by).mean() > 0.5, "negative control"
    assert 0 <= float(result["logprob_effect_low"]) < 0.145 < float(result["logprob_effect_high"])
    assert "differ by 0.1450 nat a token" in result.attrs["summary"]
    same = routing_agreement_runs.study(a, a)["agreement"]
    assert [float(same[f"logprob_effect{end}"]) for end in ("", "_low", "_high")] == [0, 0, 0]
    unknown = with_logprob(np.full(len(by), np.nan))
    missing = routing_agreement_runs.study(a, unknown)["agreement"]
    assert np.isnan(float(missing["logprob_effect"]))
    assert "nan" not in missing.attrs["summary"]


def test_runs_of_other_sequences_are_not_compared():
    a, b = (complete(planted_tokens(seed=s, n_prompts=n)) for s, n in ((0, 5), (1, 6)))
    with pytest.raises(InputError, match="different sequences"):
        compare.study(a, b)
    with pytest.raises(InputError, match="takes 2 runs, 1 given"):
        run_study("compare", a)


def test_differences_of_two_runs_are_tested_together():
    """Negative control: the intervals alone exclude zero in some head of most runs that differ by noise."""
    channels, false, alone = ("prompt", "analysis", "final"), 0, 0
    for seed in range(8):
        run = complete(planted_tokens(seed=seed, n_layers=2, n_heads=8, n_prompts=30))
        noisy = run.tokens["sink"] + np.random.default_rng([1, seed]).normal(0, 0.05, run.tokens["sink"].shape)

        def against(sink, run=run):
            other = SyntheticTokens("other", run.sequences, run.model, dict(run.tokens) | {"sink": sink}, run.truth)
            return compare.study(run, other)

        for ds in (against(noisy)[f"sinks_in_{channel}"] for channel in channels):
            false += bool(ds["different"].any())
            alone += bool((ds["low"] * ds["high"] > 0).any())
    assert false <= 4, "of 24 families"
    assert alone >= 8, "negative control"
    result = against(noisy + 0.03 * (np.arange(8) == 3))
    for channel in channels:
        assert result[f"sinks_in_{channel}"]["different"].sel(head=3).all()
    assert "no difference of log-probability shown" in result["agreement"].attrs["summary"]


@pytest.mark.parametrize("quantity", ["sink", "experts"])
def test_differences_of_two_runs_are_those_of_a_plain_estimate(quantity):
    """Means over tokens, sequences and prompts. Negative control: all tokens of a channel pooled."""
    run = complete(planted_tokens(n_layers=2, n_heads=3, n_prompts=12))
    rng, n_experts = np.random.default_rng(0), run.model["num_experts"]
    if quantity == "sink":
        changed = run.tokens["sink"] + rng.normal(0, 0.02, run.tokens["sink"].shape)
        values = run.tokens["sink"] - changed
    else:
        changed = altered(run, 0.3).tokens["experts"]
        one_hot = np.eye(n_experts)
        values = one_hot[run.tokens["experts"][..., 0]] - one_hot[changed[..., 0]]
    other = SyntheticTokens("other", run.sequences, run.model, dict(run.tokens) | {quantity: changed}, run.truth)
    label = {"sink": "sinks", "experts": "routing"}[quantity]
    result = compare.study(run, other)[f"{label}_in_analysis"]["difference"].sel(control="none")
    inside = run.tokens["channel"] == CHANNELS.index("analysis")
    sequences = [values[:, inside & (run.tokens["sequence"] == s)].mean(1) for s in run.sequences.index]
    prompts = run.sequences.groupby("prompt_id").indices.values()
    plain = np.mean([np.mean([sequences[s] for s in own], 0) for own in prompts], 0)
    np.testing.assert_allclose(result, plain, atol=1e-12)
    assert not np.allclose(values[:, inside].mean(1), plain, atol=1e-5), "negative control"


def test_a_change_at_one_effort_is_found_there_alone():
    """The planted truth is 0.5 nat in final at high effort. Negative control: pooled over efforts, it is smaller."""
    run = complete(planted_tokens(n_layers=2, n_experts=8, n_heads=1, n_prompts=30))
    high = (run.sequences["effort"] == "high").to_numpy()[run.tokens["sequence"]]
    final = run.tokens["channel"] == CHANNELS.index("final")
    noise = np.random.default_rng(3).normal(0, 0.2, len(final))
    shifted = run.tokens["logprob"] - (0.5 * (high & final) + noise)
    other = SyntheticTokens("other", run.sequences, run.model, dict(run.tokens) | {"logprob": shifted}, run.truth)
    result = compare.study(run, other)
    efforts = result["efforts"]
    different = efforts["logprob_difference_different"]
    assert bool(different.sel(effort="high", channel="final"))
    assert int(different.sum()) == 1
    cell = efforts.sel(effort="high", channel="final")
    assert cell["logprob_difference_low"] < 0.5 < cell["logprob_difference_high"]
    assert result["logprob_in_final"]["difference"].item() < 0.25, "negative control"
    assert int(efforts["tokens"].sum()) == len(final)
    assert not efforts["sink_difference_different"].any()
    assert "high, final" in efforts.attrs["summary"]
    assert efforts.attrs["summary"].count("not shown to differ") == 5
    drawn = figures.gallery(result)["efforts"].draw().data[0]
    assert list(drawn.y) == [f"{e}, {c}" for e in ("low", "medium", "high") for c in ("analysis", "final")]
    assert drawn.x[-1] == pytest.approx(0.5, abs=0.1)


class Recorded(SyntheticTokens):
    """A run that also recorded an activation of layers 1 and 3, four features wide."""

    path = "run.zarr"
    spec = SimpleNamespace(selected=[Activation("hook_resid_post", (1, 3), 4)])


def recorded(change: np.ndarray | float) -> Recorded:
    run = complete(planted_tokens(n_layers=4, n_heads=1, n_prompts=20))
    x = np.random.default_rng(5).normal(size=(2, len(run.tokens["channel"]), 4)) + change
    return Recorded("r", run.sequences, run.model, dict(run.tokens) | {"hook_resid_post": x}, run.truth)


def test_features_of_two_runs_are_compared_by_channel():
    """Feature 2 of layer 3 is planted 0.5 lower in b. Negative control: runs that are equal but for noise."""
    planted, noise = np.zeros((2, 1, 4)), np.random.default_rng(6)
    planted[1, 0, 2] = -0.5
    n = len(recorded(0.0).tokens["channel"])
    noisy = noise.normal(0, 0.3, (2, n, 4))
    result = compare.study(recorded(0.0), recorded(planted + noisy), hook="resid_post")["features_in_analysis"]
    assert np.argwhere(result["different"].sel(control="none").values).tolist() == [[1, 2]]
    cell = result.sel(control="none", layer=3, feature=2)
    assert cell["low"] < 0.5 < cell["high"]
    assert result["layer"].values.tolist() == [1, 3]
    drawn = figures.gallery({"agreement": xr.Dataset(), "features_in_analysis": result})["features_in_analysis"].draw()
    assert drawn.data[0].y[0] == "layer 3 feature 2"
    none = compare.study(recorded(0.0), recorded(noisy), hook="resid_post")["features_in_analysis"]
    assert not none["different"].any(), "negative control"
    with pytest.raises(InputError, match="is not in run"):
        compare.study(recorded(0.0), recorded(0.0), hook="hook_z")
    run = complete(planted_tokens(n_prompts=6))
    with pytest.raises(InputError, match="holds no recorded activations"):
        compare.study(run, run, hook="resid_post")


def test_differences_by_effort_are_calibrated(only_agreement):
    """Runs that differ by noise alone: at most one in twenty families has a difference, and intervals hold zero."""
    false, inside, cells = 0, 0, 0
    for seed in range(40):
        run = complete(planted_tokens(seed=seed, n_layers=1, n_experts=4, n_heads=1, n_prompts=12))
        noisy = run.tokens["logprob"] + np.random.default_rng([2, seed]).normal(0, 1, len(run.tokens["channel"]))
        other = SyntheticTokens("other", run.sequences, run.model, dict(run.tokens) | {"logprob": noisy}, run.truth)
        with only_agreement():
            efforts = compare.study(run, other)["efforts"].sel(channel=["prompt", "analysis", "final"])
        false += bool(efforts["logprob_difference_different"].any())
        inside += int(((efforts["logprob_difference_low"] < 0) & (efforts["logprob_difference_high"] > 0)).sum())
        cells += efforts["logprob_difference"].size
    assert false <= 6, "of 40 families"
    assert 0.92 <= inside / cells <= 0.99


def test_fewer_than_five_prompts_are_not_tested_and_fewer_than_twenty_are_named():
    few, some = (complete(planted_tokens(n_layers=1, n_prompts=n)) for n in (4, 9))
    result = compare.study(few, altered(few, 0.5))
    assert np.isnan(result["agreement"]["agreement_low"]).all()
    assert "cannot be tested" in result["routing_in_analysis"].attrs["summary"]
    assert "too few prompts for a test" in result["agreement"].attrs["summary"]
    assert "only 9 prompts" in compare.study(some, altered(some, 0.5))["agreement"].attrs["summary"]
