"""Runs whose prompts and efforts are confounded: no study fails, and comparisons that cannot be made are named."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from workbench.figures.report import gather, markdown
from workbench.studies import effort, expert_examples, run_study
from workbench.studies.specialization import specialization
from workbench.studies.synthetic import SyntheticRun, SyntheticTokens, planted_run, planted_tokens


def of_sequences(run: SyntheticRun, chosen: np.ndarray) -> SyntheticRun:
    """The run with these sequences alone."""
    at = np.flatnonzero(chosen)
    summaries = {name: values.isel(sequence=at) for name, values in run.summaries.items()}
    return dataclasses.replace(run, sequences=run.sequences.iloc[at].reset_index(drop=True), summaries=summaries)


@pytest.fixture(scope="module")
def by_task() -> SyntheticRun:
    """Twelve prompts of two tasks, of which one is present at low effort only and the other at high effort only."""
    run = planted_run(n_prompts=12, efforts=("low", "high"))
    low, first = run.sequences["effort"] == "low", run.sequences["task"] == "sums"
    return of_sequences(run, (low == first).to_numpy())


def test_efforts_of_different_prompts_are_named_and_not_tested(by_task: SyntheticRun) -> None:
    result = effort.study(by_task)
    assert "Unpaired: 12 of 12 prompts lack an effort" in result["cost"].attrs["summary"]
    assert (
        result["gain"].attrs["summary"] == "low → high: cannot be tested, 0 prompts have both efforts and 5 are needed."
    )
    assert not result["gain"]["gain_different"].any()
    paired = effort.study(planted_run(n_prompts=12, efforts=("low", "high")))  # negative control
    assert "Unpaired" not in paired["cost"].attrs["summary"]
    assert "nan analysis tokens" not in paired["gain"].attrs["summary"]


def test_information_on_a_label_needs_prompts_that_have_two(by_task: SyntheticRun) -> None:
    """Labels are exchanged within prompts: with one label each, all permutations are equal, and p would be 1."""
    result = specialization(by_task, "effort", n_permutations=99)
    assert np.isnan(result["p"]).all()
    assert "cannot be tested: 0 prompts with tokens of two efforts" in result.attrs["summary"]
    assert np.isfinite(specialization(by_task, "task", n_permutations=99)["p"]).all()
    paired = specialization(planted_run(n_prompts=12, efforts=("low", "high")), "effort", n_permutations=99)
    assert np.isfinite(paired["p"]).all(), "negative control"


def test_every_question_under_one_id_is_one_prompt_without_limits() -> None:
    with np.errstate(invalid="ignore"):
        estimate, low, high = expert_examples._jackknifed(lambda sums: sums, [np.ones((1, 3))], np.ones(3, dtype=int))
    assert estimate.tolist() == [1, 1, 1]
    assert np.isnan([low, high]).all()


def test_channels_of_one_token_have_no_halves_and_no_position() -> None:
    """An analysis of a single token in every sequence; half of the prompts have no final message."""
    run = planted_tokens(n_prompts=12)
    sequence, channel = run.tokens["sequence"], run.tokens["channel"]
    first = np.zeros(len(sequence), dtype=bool)
    first[np.unique(sequence * 10 + channel, return_index=True)[1]] = True
    included = (channel != 2) | first
    included &= (channel != 4) | (sequence % 2 == 0)
    axes = {"sink": 1, "experts": 1}
    tokens = {name: np.compress(included, values, axes.get(name, 0)) for name, values in run.tokens.items()}
    short = SyntheticTokens("short", run.sequences, run.model, tokens, run.truth)
    result = run_study("channels", short)
    assert "routing_halves_of_analysis" not in result
    compared = result["routing_analysis_vs_final"]
    left = compared.sel(control="none")
    assert int(left["tokens_a"]) + int(left["tokens_excluded"]) == (tokens["channel"] == 2).sum()
    assert int(left["sequences_excluded"]) == len(run.sequences) // 2
    assert "Skipped: a comparison of routing, as the first half of analysis" in compared.attrs["summary"]


def test_a_study_of_another_record_is_in_the_report_and_not_called_untested() -> None:
    run = planted_run(n_prompts=6, efforts=("low", "high"))
    assert any(text.startswith("Label probes: ") for text in gather(run).skipped)
    given = effort.study(run)["cost"].assign_attrs(sample='{"sum, low": 3, "sort": 2}')
    contents = gather(run, results={"label-probes": {"probes": given}})
    assert not any(text.startswith("Label probes: ") for text in contents.skipped)
    assert "*Sample.* 5 sequences: sum at low 3, sort 2." in markdown(contents)


def test_sequences_in_the_order_of_their_effort_are_paired_by_prompt() -> None:
    """All of low effort first. Negative control: pairing by their order in the run, where prompts differ in habits."""
    run = planted_tokens(n_prompts=16, efforts=("low", "high"), effort_shift={"high": 0.05})
    order = np.argsort((run.sequences["effort"] == "high").to_numpy(), kind="stable")
    rank = np.argsort(order)
    table = run.sequences.iloc[order].reset_index(drop=True).rename_axis("sequence")
    tokens = {**run.tokens, "sequence": rank[run.tokens["sequence"]]}
    by_token = np.argsort(tokens["sequence"], kind="stable")
    tokens = {name: np.take(v, by_token, 1 if name in ("sink", "experts") else 0) for name, v in tokens.items()}
    moved = SyntheticTokens("ordered", pd.DataFrame(table), run.model, tokens, run.truth)
    name = "low_vs_high_in_analysis"
    plan = {"between": "effort", "a": "low", "b": "high", "channel": "analysis"}
    from workbench.studies.contrast import contrast

    one, other = (contrast(r, "sink", **plan) for r in (run, moved))  # type: ignore[arg-type]
    np.testing.assert_allclose(one["difference"], other["difference"], atol=1e-12, err_msg=name)
    np.testing.assert_allclose(one["low"], other["low"], atol=1e-12)
