"""Random sets are the null: one of them, taken as the named one, is called different at the level of the test."""

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import expert_sets
from workbench.experiments.effects import load_of, logprobs, paired, routed_slots
from workbench.experiments.expert_sets import SetEffects, group_of, matched_sets, measure, named_experts
from workbench.experiments.final_channel import answered_rows, final_tokens, generated_tokens
from workbench.experiments.from_run import transcripts
from workbench.experiments.random_controls import check_controls, family_p, rank
from workbench.hooks.interventions import forbid
from workbench.studies.intervals import prompt_means


def test_a_rank_is_exact_and_two_sided() -> None:
    null = np.linspace(-1, 1, 99)
    assert rank(-5.0, null).p == pytest.approx(0.01)
    assert rank(5.0, null).p == pytest.approx(0.01)
    assert rank(0.0, null).p > 0.9
    assert rank(-5.0, null).as_low == 0
    assert rank(-5.0, null).distance == pytest.approx(-5 / null.std(ddof=1))
    draws = np.random.default_rng(0).lognormal(size=(2000, 21))
    assert np.mean([rank(row[0], row[1:]).p <= 0.05 for row in draws]) == pytest.approx(1 / 21, abs=0.015)
    with pytest.raises(InputError, match="controls=19"):
        check_controls(19)


def test_several_ranks_together_keep_the_family_wise_level() -> None:
    """Negative control: the smallest of six unadjusted p is below the level far oftener."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(1000, 21, 6)) * np.arange(1, 7)
    together = [family_p(curve[0], curve[1:]).min() <= 0.05 for curve in draws]
    alone = [min(rank(curve[0, i], curve[1:, i]).p for i in range(6)) <= 0.05 for curve in draws[:200]]
    assert np.mean(together) <= 0.07
    assert np.mean(alone) > 0.15
    assert family_p(np.full(6, 30.0), draws[0][1:]).max() == pytest.approx(1 / 21)


@pytest.fixture(scope="module")
def arithmetic() -> tuple[SetEffects, list[str], np.ndarray]:
    """Random sets with the load of the experts of arithmetic, masked: 30 sets, with the prompts and their loads."""
    nano = wb.load("nano", dtype=torch.float32)
    every = answered_rows(nano, transcripts(wb.open_run(DATA / "demo.zarr")))
    short = [row for row in every if row.effort == "low"]
    kinds = [[row for row in short if (group_of(row) == "arithmetic") is side] for side in (True, False)]
    rows = kinds[0][::2] + kinds[1][::7]
    own = np.array([group_of(row) == "arithmetic" for row in rows])
    load = load_of(routed_slots(nano, [r for r, mine in zip(rows, own, strict=True) if mine], generated_tokens(nano)))
    experts = named_experts(nano, rows, "arithmetic")
    sets = matched_sets(load, experts, 30, 0)
    tested = measure(nano, rows, own, logprobs(nano, rows, final_tokens(nano)), experts, sets, forbid)
    return tested, [r.prompt_id for r, mine in zip(rows, own, strict=True) if mine], load


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_a_random_set_taken_as_the_named_one_is_not_called_different(arithmetic) -> None:
    """Negative control: the interval of its difference from the others' mean excludes zero far more often."""
    tested, prompts, _ = arithmetic
    effects = prompt_means(tested.random, prompts).mean(-1)
    pseudo = [rank(effects[i], np.delete(effects, i)).p <= 0.05 for i in range(len(effects))]
    assert np.mean(pseudo) <= 0.07
    differences = np.stack([tested.random[i] - np.delete(tested.random, i, 0).mean(0) for i in range(len(effects))])
    _, low, high = paired(differences, prompts)
    assert np.mean((low > 0) | (high < 0)) > 0.1, "negative control"


def test_the_experts_that_routing_names_for_arithmetic_are_extreme_among_random_sets(arithmetic) -> None:
    tested, prompts, load = arithmetic
    own_change = prompt_means(tested.on_own, prompts).mean()
    ranked = rank(float(own_change), prompt_means(tested.random, prompts).mean(-1))
    assert ranked.p == pytest.approx(1 / 31)
    assert ranked.distance < -2
    assert not any(set(cells) & set(tested.own_set) for cells in tested.sets)
    assert len({tuple(cells) for cells in tested.sets}) == 30
    layers = sorted(layer for layer, _ in tested.own_set)
    assert all(sorted(layer for layer, _ in cells) == layers for cells in tested.sets)
    assert load.shape == (4, 16)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_groups_that_cannot_be_tested_stay_in_the_result() -> None:
    """Few prompts, or no random sets of their load: named with the reason, counted, and without p."""
    nano = wb.load("nano", dtype=torch.float32)
    rows = [row for row in transcripts(wb.open_run(DATA / "demo.zarr")) if row.effort == "low"]
    kinds = {"reverse": 5, "sum": 5, "recall": 3}
    rows = [row for task, n in kinds.items() for row in [r for r in rows if r.meta["task"] == task][:n]]
    result = expert_sets.change_experts(nano, rows, 0, forbid, "title", controls=20)["experts"]
    assert list(result["group"].values) == ["arithmetic", "facts", "strings"]
    assert "facts" in result.attrs["not_tested"]
    assert "1 of 3 groups cannot be tested: facts" in result.attrs["summary"]
    assert np.isnan(result["p"].sel(group="facts"))
    assert "q of at least 0.095" in result.attrs["summary"], "two groups with 20 random sets each"
    assert "use at least 39 controls" in result.attrs["summary"]
    assert expert_sets._too_few_sets(np.array([39, 0, 39])) == [], "negative control: enough random sets"
    assert result["random"].sizes == {"group": 3, "set": 20}
    ratio = result["random_load_ratio"].sel(group="arithmetic")
    assert float(ratio.mean()) == pytest.approx(float(result["load_ratio"].sel(group="arithmetic")))
    assert bool((result["q"] >= result["p"]).sel(group="strings"))
    with pytest.raises(InputError, match="controls=5"):
        expert_sets.change_experts(nano, rows, 0, forbid, "title", controls=5)
    with pytest.raises(InputError, match="of one group"):
        expert_sets.change_experts(nano, rows[:5], 0, forbid, "title", controls=20)
