"""Circuits of two channels are compared prompt by prompt, and equal ones are found equal."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import circuits
from workbench.experiments.from_run import transcripts
from workbench.figures import default
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def pairs(model: GptOss) -> list[dict[str, circuits.AttributionGraph]]:
    return circuits.paired_graphs(model, transcripts(wb.open_run(DATA / "demo.zarr"), range(2, 75, 3)), max_nodes=60)


def test_both_graphs_explain_the_same_token(model: GptOss, pairs: list[dict[str, circuits.AttributionGraph]]) -> None:
    assert len(pairs) >= 20
    for pair in pairs:
        analysis, final = pair["analysis"], pair["final"]
        assert analysis.metadata["target_id"] == final.metadata["target_id"]
        assert final.tokens[: len(analysis.tokens)] == analysis.tokens, "the same sequence, up to an earlier token"
        assert final.tokens[len(analysis.tokens)] == analysis.metadata["target_id"]
        assert "final" in "".join(final.texts[len(analysis.tokens) :])


def test_shares_are_counts_over_prompts(pairs: list[dict[str, circuits.AttributionGraph]]) -> None:
    table = circuits.compare(pairs)
    row = table.iloc[0]
    for channel in circuits.CHANNELS:
        count = sum((row["source"], row["target"]) in circuits._edges(pair[channel]) for pair in pairs)
        assert row[channel] == pytest.approx(count / len(pairs))
        assert row[f"{channel}_low"] <= row[channel] <= row[f"{channel}_high"]
    assert (table["q"] >= table["p"] - 1e-12).all()
    equal = circuits.compare([{"analysis": pair["final"], "final": pair["final"]} for pair in pairs])
    assert (equal["difference"] == 0).all()
    assert (equal["p"] == 1).all()
    assert table["q"].min() < 0.05, "the negative control: the two channels differ, and equal ones do not"


def test_similarity_is_one_for_equal_circuits(pairs: list[dict[str, circuits.AttributionGraph]]) -> None:
    equal = circuits.similarity([{"analysis": pair["final"], "final": pair["final"]} for pair in pairs])
    assert equal.loc["same prompt", "cosine"] == pytest.approx(1)
    result = circuits.similarity(pairs)
    assert result["low"].min() >= -2
    assert result.loc["same prompt", ["low", "high"]].between(-1, 1).all(), "a cosine"
    assert 0 < result.loc["same prompt", "cosine"] < 0.99
    assert (result["low"] <= result["cosine"]).all()
    assert (result["cosine"] <= result["high"]).all()
    names = ["analysis, other prompts", "final, other prompts"]
    wanted = result.loc["same prompt", "cosine"] - result.loc[names, "cosine"].mean()
    assert result.loc["same prompt less other prompts", "cosine"] == pytest.approx(wanted)
    print(result)


def test_pairs_of_different_prompts_are_the_null(pairs: list[dict[str, circuits.AttributionGraph]]) -> None:
    name = "same prompt less other pairs"
    planted = circuits.similarity([{"analysis": pair["final"], "final": pair["final"]} for pair in pairs]).loc[name]
    assert planted["low"] > 0
    assert planted["p"] <= 0.001
    rng = np.random.default_rng(0)
    null = []
    for _ in range(8):  # null data: each analysis with the final answer of a random prompt
        order = rng.permutation(len(pairs)).tolist()
        null.append(
            [{"analysis": a["analysis"], "final": pairs[b]["final"]} for a, b in zip(pairs, order, strict=True)]
        )
    p = [circuits.similarity(shifted).loc[name, "p"] for shifted in null]
    assert min(p) > 0.001, "the negative control: pairs that have no prompt in common are no more alike"
    assert max(p) > 0.2


def _of_tasks(pairs: list, tasks: list[str]) -> list:
    """Return the pairs with other tasks in their metadata."""
    return [
        {c: replace(one, metadata=one.metadata | {"task": task}) for c, one in pair.items()}
        for pair, task in zip(pairs, tasks, strict=True)
    ]


def test_other_prompts_are_those_of_the_same_task(pairs: list[dict[str, circuits.AttributionGraph]]) -> None:
    """Two tasks of one circuit each: prompts are alike because of the task, which is not evidence of the prompt."""
    name, half = "same prompt less other pairs", len(pairs) // 2
    tasks = ["first"] * half + ["second"] * (len(pairs) - half)
    first, second = (
        pairs[0],
        next(p for p in pairs if circuits._edges(p["final"]) != circuits._edges(pairs[0]["final"])),
    )
    planted = [{c: one["final"] for c in circuits.CHANNELS} for one in [first] * half + [second] * (len(pairs) - half)]
    within = circuits.similarity(_of_tasks(planted, tasks)).loc[name]
    assert within["cosine"] == pytest.approx(0, abs=1e-12)
    assert within["p"] > 0.9
    pooled = circuits.similarity(_of_tasks(planted, ["all"] * len(pairs))).loc[name]
    assert pooled["low"] > 0, "the negative control: without tasks the task counts as the prompt"
    assert pooled["p"] < 0.001
    alone = circuits.similarity(_of_tasks(pairs, ["same"] * 4 + [str(i) for i in range(len(pairs) - 4)]))
    assert alone.loc[name, "prompts"] == 4
    assert np.isnan(alone.loc[name, "cosine"])
    assert alone.loc["same prompt", "prompts"] == len(pairs)


def test_the_experiment_gives_what_its_parts_give(model: GptOss, monkeypatch: pytest.MonkeyPatch, pairs: list) -> None:
    monkeypatch.setattr(circuits, "paired_graphs", lambda *_, **__: pairs)
    result = circuits.experiment(model, [])
    table, alike = circuits.compare(pairs), circuits.similarity(pairs)
    assert result["edges"].attrs["edges_in_all"] == len(table)
    assert float(result["edges"]["q"].min()) == pytest.approx(table["q"].min())
    assert result["similarity"]["cosine"].values.tolist() == pytest.approx(alike["cosine"].tolist())
    assert result["similarity"].attrs["summary"].count("of the same task") == 1
    drawn = default.gallery(result)["similarity_cosine"].draw()
    assert drawn.data[0].error_x.array is not None or drawn.data[0].error_x.arrayminus is not None, "with intervals"
    equal = [{"analysis": pair["final"], "final": pair["final"]} for pair in pairs]
    monkeypatch.setattr(circuits, "paired_graphs", lambda *_, **__: equal)
    control = circuits.experiment(model, [])
    assert "0 differ between the channels" in control["edges"].attrs["summary"]
    assert "more alike than" in control["similarity"].attrs["summary"], "the negative control: equal circuits"


def test_what_cannot_be_compared_is_refused(model: GptOss) -> None:
    with pytest.raises(InputError, match="no sequence has the first token"):
        circuits.paired_graphs(model, [])
    with pytest.raises(InputError, match="at least one pair"):
        circuits.compare([])
    assert circuits.same_token(model, model.to_tokens("12+34=")[0].tolist()) is None
