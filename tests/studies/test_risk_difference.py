"""Risk differences: SteerMoE's definition, planted experts found, token identity removed, nulls calibrated."""

from typing import Any

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.figures import risk_difference as figures
from workbench.harmony.labels import CHANNELS
from workbench.studies import risk_difference
from workbench.studies.comparison import prompt_numbers
from workbench.studies.contrast import contrast
from workbench.studies.risk_difference import default_control, promoted_and_demoted, strictest, study
from workbench.studies.selection_rates import GROUPS, TokenSides
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


def with_words(run: SyntheticTokens, seed: int = 0) -> SyntheticTokens:
    """The run with words that the channel prefers: analysis has mostly even ids, final mostly odd ones."""
    rng = np.random.default_rng(seed)
    n = len(run.tokens["position"])
    odd = rng.random(n) < np.where(run.tokens["channel"] == CHANNELS.index("final"), 0.8, 0.2)
    ids = 2 * rng.integers(0, 6, n) + odd
    return SyntheticTokens(run.digest, run.sequences, run.model, {**run.tokens, "id": ids}, run.truth)


def test_the_pooled_difference_is_the_definition_of_steermoe() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    result = study(run, a="channel=final", b="channel=analysis")["experts"]
    counts, tokens = (run.summary(n).sum("sequence") for n in ("expert_count", "tokens"))
    rates = [counts.sel(channel=c) / tokens.sel(channel=c) for c in ("final", "analysis")]
    np.testing.assert_allclose(result["difference"].sel(control="pooled"), rates[0] - rates[1], atol=1e-12)
    np.testing.assert_allclose(result["rate_a"], rates[0], atol=1e-12)
    for control in ("prompt", "prompt and token", "pooled"):  # the rates that are printed differ by the difference
        one = result.sel(control=control)
        np.testing.assert_allclose(one["mean_a"] - one["mean_b"], one["difference"], atol=1e-12)
    of_prompts, opposite = result.sel(control="prompt"), rates[0].values - rates[1].values
    assert (np.sign(opposite) != np.sign(of_prompts["difference"].values))[of_prompts["different"].values].any(), (
        "negative control: rates of all tokens, printed before, contradict the sign"
    )
    assert strictest(result) == "prompt and token"
    assert "more in channel=final" in result.attrs["summary"]
    assert result["control"].values.tolist() == ["prompt", "prompt and token", "pooled", "token"]
    drawn = figures.gallery({"experts": result})
    assert len(drawn) == 5
    assert all(item.draw().data and len(item.table()) for item in drawn.values())


def test_a_planted_expert_is_found_under_every_control() -> None:
    run = with_words(planted_tokens(seed=1, expert_shift={"final": 0.3}))
    result = study(run)["experts"]
    for control in result["control"].values:
        one = result.sel(control=control, expert=0)
        assert one["different"].all(), control
        truth = 0.3 * (1 - run.truth["base"][:, 0])
        assert ((one["low"] - 0.05 < truth) & (truth < one["high"] + 0.05)).all(), control
    assert set(promoted_and_demoted(result, 2)["promote"]) == {0, 1}
    assert all(experts[0] == 0 for experts in promoted_and_demoted(result, 2)["promote"].values())


def test_the_default_is_taken_within_prompts_as_in_all_studies() -> None:
    """Negative control: the pooled difference of the same tokens has other numbers and another sign somewhere."""
    run = wb.open_run(DATA / "demo.zarr")
    result = study(run, a="channel=final", b="channel=analysis")["experts"]
    k = run.model["experts_per_token"]
    theirs = contrast(run, "experts", "channel", "final", "analysis", controls=("none", "token"))
    for control, name in (("prompt", "none"), ("prompt and token", "token")):
        one, other = result.sel(control=control), theirs.sel(control=name)
        for variable in ("difference", "low", "high", "bound"):
            np.testing.assert_allclose(one[variable], k * other[variable], atol=1e-12)
        for variable in ("p", "q", "different"):
            np.testing.assert_allclose(one[variable], other[variable], atol=1e-12)
        for variable in ("prompts", "prompts_excluded", "tokens_excluded", "tokens_a"):
            assert int(one[variable]) == int(other[variable])
    by_effort = study(run, a="channel=prompt,effort=low", b="channel=prompt,effort=high")["experts"]
    theirs = contrast(run, "experts", "effort", "low", "high", channel="prompt").sel(control="none")
    np.testing.assert_allclose(by_effort["low"].sel(control="prompt"), k * theirs["low"], atol=1e-12)
    signs = np.sign(result["difference"])
    assert (signs.sel(control="pooled") != signs.sel(control="prompt")).any(), "negative control"
    assert default_control(result) == "prompt"
    assert result.attrs["summary"].splitlines()[0].startswith("Within prompts (180 prompts")
    assert "Unpaired, all tokens pooled" in result.attrs["summary"]


@pytest.mark.parametrize(("n_prompts", "expected"), [(4, "cannot be tested"), (9, "only 9 prompts")])
def test_few_prompts_are_not_tested_or_named(n_prompts: int, expected: str) -> None:
    result = study(planted_tokens(n_prompts=n_prompts, n_layers=1))["experts"]
    assert expected in result.attrs["summary"]
    assert np.isfinite(result["p"].sel(control="prompt")).all() == (n_prompts >= 5)
    assert np.isfinite(result["p"].sel(control="pooled")).all() == (n_prompts >= 5)


def test_tasks_share_no_prompt_and_the_summary_reports_it() -> None:
    run = planted_tokens(n_prompts=13, n_layers=1)  # seven prompts of one task, six of the other
    result = study(run, a="task=t0,channel=analysis", b="task=t1,channel=analysis")["experts"]
    assert result.attrs["summary"].startswith("No prompt has both sides")
    assert int(result["prompts"].sel(control="pooled")) == 6


def by_words(seed: int) -> SyntheticTokens:
    """Experts follow the word alone, and words differ between channels: no difference at the same token."""
    run = with_words(planted_tokens(seed=seed, n_prompts=30), seed)
    rng = np.random.default_rng([seed, 7])
    experts = np.where(
        run.tokens["id"] % 2 & (rng.random(len(run.tokens["id"])) < 0.6), 0, run.tokens["experts"][..., 0]
    )
    return SyntheticTokens(
        run.digest, run.sequences, run.model, {**run.tokens, "experts": experts[..., None]}, run.truth
    )


def test_a_difference_of_words_disappears_within_tokens_and_is_called_one_when_pooled() -> None:
    trials, false, pooled = 12, 0, 0
    for seed in range(trials):
        result = study(by_words(seed))["experts"]
        pooled += int(result["different"].sel(control="pooled", expert=0).all())
        false += int(result["different"].sel(control="prompt and token").any())
        false += int(result["different"].sel(control="token").any())
    assert pooled == trials, "the negative control: without matching, words look like channels"
    assert false <= 4, f"{false} of {2 * trials} families have a false difference at q < 0.05"


@pytest.mark.parametrize("n_prompts", [12, 24, 60, 200])
def test_p_is_calibrated_for_prompts_of_two_tasks(n_prompts: int, long: bool) -> None:
    """Jackknife over at most 20 groups of prompts. Printed: p below 0.05, and families with a difference."""
    p: dict[str, list[np.ndarray]] = {"pooled": [], "token": []}
    families = dict.fromkeys(p, 0)
    seeds = 200 if long else {12: 10, 24: 25}.get(n_prompts, 0)
    for seed in range(seeds):
        run = planted_tokens(seed=seed, n_prompts=n_prompts, n_layers=1)
        result = study(run, a="task=t0,channel=analysis", b="task=t1,channel=analysis")["experts"]
        assert list(result["control"].values) == ["pooled", "token"]
        for control, values in p.items():
            values.append(result["p"].sel(control=control).values.ravel())
            families[control] += bool(result["different"].sel(control=control).any())
    if not seeds:
        pytest.skip("with --long")
    rates = {control: float((np.concatenate(values) < 0.05).mean()) for control, values in p.items()}
    shares = {control: n / seeds for control, n in families.items()}
    print(f"| {n_prompts} prompts | {' | '.join(f'{rates[c]:.3f}, {shares[c]:.3f}' for c in p)} |")
    for control in p:
        assert 0.005 <= rates[control] <= (0.07 if long else 0.12), (control, rates)
        assert shares[control] <= (0.08 if long else 0.2), (control, shares)


def test_tokens_taken_as_independent_would_be_called_different() -> None:
    """Negative control: the prompt's habit is in every token, so a token-level error is several times too small."""
    run = planted_tokens(seed=3, n_prompts=24, n_layers=1)
    result = study(run, a="task=t0,channel=analysis", b="task=t1,channel=analysis")["experts"].sel(control="pooled")
    rate = (result["rate_a"] + result["rate_b"]) / 2
    naive = np.sqrt(rate * (1 - rate) * (1 / result["tokens_a"] + 1 / result["tokens_b"]))
    assert float((((result["high"] - result["low"]) / 2) / (1.96 * naive)).mean()) > 1.05


def test_groups_hold_equally_many_prompts_with_the_same_sides() -> None:
    run = planted_tokens(seed=1, n_prompts=50)
    number = prompt_numbers(run.sequences)
    sides = TokenSides(run, ({"channel": "final"}, {"channel": "analysis"}), number)
    assert int(sides.counts[0].sum()) == int((run.tokens["channel"] == CHANNELS.index("final")).sum())
    groups = sides.groups(np.random.default_rng(0))
    both = np.logical_and(*sides.prompts_of_sides())
    counted = np.bincount(groups[both], minlength=GROUPS)
    assert len(counted) == GROUPS
    assert counted.max() - counted.min() <= 1
    drawn = np.random.default_rng(0).integers(0, GROUPS, len(groups))[both]  # negative control: groups drawn freely
    assert np.ptp(np.bincount(drawn, minlength=GROUPS)) > 1


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"a": "channel=finale"}, "channel 'finale': choose from"),
        ({"a": "channel=final", "b": "channel=final"}, "tokens are on both sides"),
        ({"a": "effort=high,effort=low"}, "expected NAME=VALUE, each name once"),
        ({"a": "channel=commentary"}, "no token of the run is on side a"),
        ({"a": "weather=fine"}, "'weather' is not a label"),
    ],
)
def test_wrong_sides_are_refused(sides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(planted_tokens(n_prompts=6), **sides)


def test_a_control_that_the_result_lacks_is_refused() -> None:
    result = study(planted_tokens(n_prompts=6))["experts"]
    with pytest.raises(InputError, match="control 'nothing': the result has prompt, prompt and token, pooled"):
        risk_difference.promoted_and_demoted(result, control="nothing")
