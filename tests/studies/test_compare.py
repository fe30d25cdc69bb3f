"""The comparison of two runs: planted agreement is in its interval, unrelated routers agree by load alone."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.studies import compare, run_study
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


def test_planted_agreement_between_two_runs_is_in_its_interval():
    inside = 0
    for seed in range(100):
        run = complete(planted_tokens(seed=seed, n_layers=1, n_experts=8, n_heads=1, n_prompts=25))
        found = compare.study(run, altered(run, 0.4, seed))["agreement"].sel(channel="analysis").isel(layer=0)
        inside += bool(found["agreement_low"] <= 0.6 + 0.4 / 8 <= found["agreement_high"])
    assert inside >= 93
    same = compare.study(run, run)["agreement"]
    assert (same["agreement"].dropna("channel") == 1).all()
    assert not same["logprob_difference"].dropna("channel").any()


def test_unrelated_routers_agree_by_load_alone():
    run = complete(planted_tokens(n_layers=1, n_experts=8, n_heads=1, n_prompts=60))
    found = compare.study(run, altered(run, 1.0))["agreement"].sel(channel="analysis").isel(layer=0)
    assert abs(float(found["beyond_load"])) < 0.03
    assert float(found["agreement"]) > 0.1


def test_runs_of_other_sequences_are_not_compared():
    a, b = (complete(planted_tokens(seed=s, n_prompts=n)) for s, n in ((0, 5), (1, 6)))
    with pytest.raises(InputError, match="different sequences"):
        compare.study(a, b)
    with pytest.raises(InputError, match="takes 2 runs, 1 given"):
        run_study("compare", a)


def test_differences_of_two_runs_are_tested_together():
    """Negative control: the intervals alone exclude zero in some head of a run that differs by noise."""
    run = complete(planted_tokens(n_layers=2, n_heads=8, n_prompts=30))
    noise = np.random.default_rng(1).normal(0, 0.05, run.tokens["sink"].shape)

    def against(sink):
        other = SyntheticTokens("other", run.sequences, run.model, dict(run.tokens) | {"sink": sink}, run.truth)
        return compare.study(run, other)["agreement"]

    found = against(run.tokens["sink"] + noise)
    assert not found["sink_difference_different"].any()
    assert (found["sink_difference_low"] * found["sink_difference_high"] > 0).any(), "negative control"
    found = against(run.tokens["sink"] + noise + 0.03 * (np.arange(8) == 3))
    shown = found["sink_difference_different"].any(("channel", "layer"))
    assert np.flatnonzero(shown).tolist() == [3]
    assert "no difference of log-probability shown" in found.attrs["summary"]
