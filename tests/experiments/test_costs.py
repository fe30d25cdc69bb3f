"""Costs of experiments: the speeds are those that were measured, and the tokens those that an experiment computes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench import registry
from workbench.experiments import costs
from workbench.experiments.registry import run_experiment
from workbench.model.transformer import GptOss
from workbench.registry import Work

MEASURED = json.loads((Path(__file__).parents[2] / "docs" / "bench_gpu.json").read_text())


def test_the_speeds_are_those_that_were_measured() -> None:
    rows = {(row["model"], row["problem"]): row for row in MEASURED["timings"]["models"]}
    for size, speed in costs.SPEEDS.items():
        prefill, decode = (size, "prefill of 8,192, no logits"), (size, "decode of 64 after 1,024")
        assert speed.forward == round(rows[prefill]["tokens_per_s"])
        assert speed.decode == round(rows[decode]["tokens_per_s"])
    (recorded,) = (row for row in MEASURED["recording"]["rows"] if row["tokens"] == 8192)
    assert recorded["recorder"] == pytest.approx(costs.RECORDING - 1, abs=0.01)


def test_the_time_is_that_of_tokens_over_speeds() -> None:
    speed = costs.SPEEDS["20b"]
    result = costs.cost(Work(passes=2, layer_passes=1, new_tokens=100), "20b", sequences=3, sequence_tokens=10)
    assert (result.forward, result.gradient, result.new_tokens) == (30 * 26, 0, 100)
    assert result.seconds == pytest.approx(costs.RECORDING * 780 / speed.forward + 100 / speed.decode)
    wide = costs.cost(Work(width_passes=0.5), "20b", sequences=3, sequence_tokens=10)
    assert wide.gradient == 30 * 1440
    assert wide.seconds == pytest.approx(costs.GRADIENT * wide.gradient / speed.forward)


@pytest.mark.filterwarnings("ignore:only .* prompts")
@pytest.mark.parametrize("name", ["counterfactual-routing", "sink-ablation"])
def test_an_experiment_computes_what_its_record_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward tokens of nano, counted; negative control: three times as many."""
    model, run = wb.load("nano", dtype=torch.float32), wb.open_run(DATA / "demo.zarr")
    counted, residual = [0], GptOss.residual

    def count(self: GptOss, tokens: torch.Tensor, **others: Any) -> torch.Tensor:
        counted[0] += tokens.numel()
        return residual(self, tokens, **others)

    monkeypatch.setattr(GptOss, "residual", count)
    result = run_experiment(name, model, run, sequences=15)
    sequences = json.loads(next(iter(result.values())).attrs["parameters"])["sequences"]
    tokens = run.sequences["length"].mean() * sequences
    record = registry.find(name)
    assert isinstance(record, registry.Experiment)
    assert record.work is not None
    stated = tokens * (record.work.passes + record.work.layer_passes * model.cfg.n_layers)
    assert 0.6 < counted[0] / stated < 1.7, (counted[0], stated)
    assert not 0.6 < counted[0] / (stated / 3) < 1.7, "negative control"


def times(page: str) -> dict[str, tuple[str, str]]:
    """The times of 20b and 120b in the table of a page, by the name of the experiment."""
    rows = re.findall(r"^\| \[.*?\]\(.*?\) \| `([\w-]+)` \| .* \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    return {name: (small, large) for name, small, large in rows if small != "–"}


def test_the_times_of_the_gallery_are_those_of_the_command() -> None:
    """Negative control: a changed number is noticed."""
    page = (Path(__file__).parents[2] / "docs" / "gallery.md").read_text()
    stated = times(page)
    assert len(stated) == 8
    estimated = {}
    for name in stated:
        record = registry.find(name)
        assert isinstance(record, registry.Experiment)
        assert record.work is not None
        estimated[name] = tuple(
            costs.clock(costs.cost(record.work, size, sequences=200, sequence_tokens=1500).seconds)
            for size in ("20b", "120b")
        )
    assert stated == estimated
    assert times(page.replace("| 24 min |", "| 25 min |")) != estimated, "negative control"


def test_info_prints_the_cost_of_every_experiment() -> None:
    done = run_command("info", "20b", "--experiments", "200", "--sequence-tokens", "1500")
    assert done.code == 0
    for record in registry.experiments():
        assert record.name in done.out
    assert "Estimated, not measured" in done.out
    assert run_command("info", "nano", "--experiments", "200").code == 2
