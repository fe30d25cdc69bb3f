"""Directions, probes, answers and top experts against plain computations, on a run of nano and in the model.

Tests `workbench.research.answers`, `workbench.research.directions`, `workbench.research.probes`,
`workbench.research.top_experts` and `workbench.runs.views`.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments.from_run import transcripts
from workbench.model.transformer import GptOss
from workbench.runs.reader import Run
from workbench.studies import run_study


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def run(nano: GptOss, tmp_path_factory: pytest.TempPathFactory) -> Run:
    demo = wb.open_run(DATA / "demo.zarr")
    folder = tmp_path_factory.mktemp("research")
    rows = transcripts(demo, demo.sequences.index[::13].tolist())  # all efforts and tasks
    wb.harmony.write_transcripts(folder / "t.jsonl", rows)
    return wb.capture(nano, folder / "t.jsonl", folder / "run", record=["resid_post:1,2", "routing"])


def test_a_direction_is_the_difference_of_means_in_a_run_and_in_a_model(nano: GptOss, run: Run) -> None:
    chosen = run.sequences.index[:6].tolist()
    got = wb.direction(run, "resid_post", 2, a="final", b={"channel": "prompt", "role": "user"}, sequences=chosen)
    live = wb.direction(
        nano, "resid_post", 2, a="final", b={"channel": "prompt", "role": "user"}, transcripts=run, sequences=chosen
    )
    means = []
    for name, role in (("final", "assistant"), ("prompt", "user")):
        per_sequence = []
        for number in chosen:
            tokens = run.sequence(number)
            mask = ((tokens["channel_name"] == name) & (tokens["role_name"] == role)).values
            if mask.any():
                per_sequence.append(tokens["hook_resid_post"].sel(layer=2).values[mask].mean(0))
        means.append(np.mean(per_sequence, 0))
    np.testing.assert_allclose(got, means[0] - means[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(live, got, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="layer 3 of hook_resid_post was not recorded"):
        wb.direction(run, "resid_post", 3, a="final", b="analysis")
    with pytest.raises(InputError, match="record it with --record attn_out"):
        wb.direction(run, "attn_out", 2, a="final", b="analysis")
    with pytest.raises(InputError, match="needs transcripts="):
        wb.direction(nano, "resid_post", 2, a="final", b="analysis")


def test_a_probe_reads_the_channel_and_not_random_labels(run: Run) -> None:
    data = wb.probe(run, "channel", where={"channel": ["analysis", "final"]}, layers=[2], by="position", max_tokens=900)
    everywhere = data.sel(position="all", layer=2)
    assert float(everywhere["accuracy"]) > float(everywhere["baseline"]) + 0.05
    assert int(data["tokens"].sel(layer=2)[1:].sum()) == int(everywhere["tokens"]) <= 900
    random = pd.Series(np.random.default_rng(0).choice(["a", "b"], len(run.sequences)), index=run.sequences.index)
    chance = wb.probe(run, random, layers=[2], max_tokens=900).sel(layer=2, group="all")
    assert abs(float(chance["accuracy"]) - 0.5) < 0.15, "the negative control: labels that mean nothing"
    assert float(everywhere["selectivity"]) == float(everywhere["accuracy"]) - float(everywhere["control"])
    assert float(everywhere["accuracy_bigram"]) > float(everywhere["baseline"]), "words alone tell much of the channel"
    with pytest.raises(InputError, match="'colour' is not a label"):
        wb.probe(run, "colour")


def test_answers_have_texts_lengths_and_correctness_with_intervals(nano: GptOss, tmp_path: Path) -> None:
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i}*7"}], "expected": str(i * 7)}
        for i in range(12, 17)
    ]
    answers = wb.answers(nano, rows, effort=["low", "medium"], samples=2, temperature=0.7, max_new_tokens=60)
    table = answers.table
    assert len(table) == 20
    final = table[table["complete"]]
    assert (final["correct"] == (final["text"] == final["expected"])).all()
    assert (table["new_tokens"] == [len(t.tokens) - t.n_prompt for t in answers.transcripts]).all()
    accuracy = answers.accuracy()
    assert accuracy["effort"].tolist() == ["low", "medium"]
    assert accuracy["answers"].tolist() == [10, 10]
    for row in accuracy.itertuples():
        own = table[table["effort"] == row.effort]
        np.testing.assert_allclose(row.accuracy, own["correct"].mean())
        assert row.accuracy_low <= row.accuracy <= row.accuracy_high
    always = wb.answers(nano, rows, effort="low", max_new_tokens=60, correct=lambda text, expected: True)
    assert always.table["correct"].all()
    cut = wb.answers(nano, rows, effort="high", max_new_tokens=3)
    assert not cut.table["correct"].any()
    assert not cut.table["complete"].any()
    wb.harmony.write_transcripts(tmp_path / "t.jsonl", answers.transcripts)
    pd.testing.assert_frame_equal(wb.accuracy(tmp_path / "t.jsonl", model=nano), accuracy)
    with pytest.raises(InputError, match="give a file, or a list of texts"):
        wb.answers(nano, "what is 2+3")
    with pytest.raises(InputError, match="no row has `correct`"):
        wb.answers(nano, ["2+3"], effort="low", max_new_tokens=5).accuracy()


def test_accuracy_counts_prompts_not_samples() -> None:
    table = pd.DataFrame({"prompt_id": ["a", "b"] * 50, "correct": [1, 0] * 50, "effort": "low"})
    one = wb.accuracy(table).iloc[0]
    assert np.isnan([one["accuracy_low"], one["accuracy_high"]]).all(), "100 samples of two prompts are two prompts"
    assert one["note"] == "only 2 prompts: an interval needs at least 5"
    many = wb.accuracy(table.assign(prompt_id=range(100))).iloc[0]
    assert many["accuracy_high"] - many["accuracy_low"] < 0.25
    assert many["note"] == ""


def test_accuracy_is_that_of_the_effort_study_and_has_a_width_where_all_answers_agree() -> None:
    demo = wb.open_run(DATA / "demo.zarr")
    cost = run_study("effort", demo)["cost"].sel(task="all")
    table = wb.accuracy(demo).set_index("effort")
    for name in ("accuracy", "accuracy_low", "accuracy_high"):
        np.testing.assert_allclose(table.loc[list(cost["effort"].values), name], cost[name])
    always = wb.accuracy(pd.DataFrame({"prompt_id": range(12), "correct": 1, "effort": "high"})).iloc[0]
    assert always["accuracy_low"] < 0.8 < always["accuracy_high"] == 1, "a percentile bootstrap has no width here"
    assert always["note"].startswith("only 12 prompts")


def test_top_experts_are_those_of_the_largest_lift(run: Run) -> None:
    table = wb.top_experts(run, 5, label="final")
    assert table["lift"].is_monotonic_decreasing
    counts = run.summary("expert_count").sum("sequence")
    share = counts / counts.sum("expert")
    layer, expert = int(table.iloc[0]["layer"]), int(table.iloc[0]["expert"])
    assert float(share.sel(channel="final")[layer, expert]) > 1.2 * float(share.sel(channel="analysis")[layer, expert])
    with pytest.raises(InputError, match="use one of channel, effort, task"):
        wb.top_experts(run, axis="role")


def test_labels_are_named_in_the_view_and_in_the_store(run: Run) -> None:
    data = run.dataset
    assert set(np.unique(data["channel_name"].values)) <= set(wb.harmony.CHANNELS)
    meanings = xr.open_zarr(run.path, group="tokens", consolidated=False)["channel"].attrs["flag_meanings"].split()
    assert meanings == list(wb.harmony.CHANNELS)
    chosen = run.select(channel="final", effort=["low", "high"])
    assert set(chosen["channel_name"].values) == {"final"}
    assert set(chosen["effort"].values) == {"low", "high"}
    assert chosen.sizes["token"] == int(((data["channel_name"] == "final") & (data["effort"] != "medium")).sum())
    for wrong, message in (({"channel": "thinking"}, "the run has frame"), ({"colour": "red"}, "not a label")):
        with pytest.raises(InputError, match=message):
            run.select(**wrong)


def test_prompts_can_be_grouped_and_plots_have_names_and_units() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    chosen = run.select(channel="final", effort="low")
    by_prompt = chosen["logprob"].groupby("prompt_id").mean()
    owner = run.sequences["prompt_id"].loc[chosen["sequence"].values].to_numpy()
    plain = chosen["logprob"].to_series().groupby(owner).mean()
    np.testing.assert_allclose(by_prompt, plain.loc[by_prompt["prompt_id"].values], rtol=1e-5)
    shifted = plain.to_numpy()[np.r_[1 : len(plain), 0]]
    assert not np.allclose(by_prompt, shifted), "the negative control: means of other prompts"
    data = run.dataset
    assert data["logprob"].attrs["units"] == "nat"
    xr.testing.assert_identical(run["logprob"], data["logprob"])
    with pytest.raises(InputError, match=r"'colour' is not in .*: it has .*logprob"):
        run["colour"]
    unnamed = [str(name) for name in (*data.data_vars, *data.coords) if not data[name].attrs.get("long_name")]
    assert unnamed == []


def test_sums_over_tokens_are_not_added_up_in_float16() -> None:
    sink = wb.open_run(DATA / "demo.zarr").dataset["sink"].sel(layer=[0])
    assert sink.attrs["stored_dtype"] == "float16"
    exact = sink.values.astype(np.float64).mean(1)
    np.testing.assert_allclose(sink.mean("token"), exact, rtol=1e-5)
    lossy = sink.astype(np.float16).mean("token").values
    assert np.abs(lossy / exact - 1).max() > 1e-4, "the negative control: the dtype that is stored"


def test_texts_of_messages_are_complete_also_where_one_was_cut(nano: GptOss, run: Run) -> None:
    number = int(run.sequences.index[0])
    ids = run.sequence(number)["id"].values
    assert run.text(number) == nano.tokenizer.decode(ids.tolist())
    messages = run.conversation(str(run.sequences.loc[number, "id"]))
    for message in messages:
        assert nano.tokenizer.decode(ids[message["text_span"]].tolist()) == message["text"]
    assert run.text(number, channel="final") == messages[-1]["text"]
    cut = ids[:-2]
    last = wb.harmony.label(cut, tokenizer=nano.tokenizer).messages[-1]
    assert last.stop == -1
    assert cut[last.text_span].tolist() == cut[last.content :].tolist() != cut[last.content : last.stop].tolist()


@pytest.mark.parametrize(
    ("name", "message"), [("top_experts", "wb.top_experts"), ("probe", "wb.probe"), ("accuracy", "wb.accuracy")]
)
def test_names_that_a_run_does_not_have_say_where_it_is(run: Run, name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        getattr(run, name)
    assert not hasattr(run, "colour")
