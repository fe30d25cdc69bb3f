"""The first run on a GPU records every kind of failure and goes on; its steps find what is wrong."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from tests.model.fake_gpus import Machine
from workbench.bench import first, first_steps
from workbench.bench.first import STEPS, Step
from workbench.cli import app
from workbench.errors import JobError
from workbench.hooks import recorders
from workbench.kernels import mxfp4
from workbench.model import decode_graph
from workbench.model.cache import KVCache
from workbench.model.transformer import GptOss

STUBS = """
import os, time
from workbench.bench.first_steps import Skipped
from workbench.errors import JobError

def passes(device): return {"device": device}
def crashes(device): os.kill(os.getpid(), 11)
def raises(device): raise ValueError("an unexpected error")
def is_wrong(device): raise JobError("logits differ by 7.0")
def hangs(device): time.sleep(60)
def lacks(device): raise Skipped("the tool is not here")
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub_steps.py").write_text(STUBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def step(name: str, *, limit_s: float = 600, timing: bool = False) -> Step:
    return Step(name, f"checks {name}", f"stub_steps:{name}", limit_s, timing)


@pytest.mark.usefixtures("stubs")
def test_every_kind_of_failure_is_recorded_and_the_rest_runs(tmp_path: Path) -> None:
    names = ("crashes", "raises", "is_wrong", "lacks", "passes")
    timed = step("passes", timing=True)._replace(name="timed")
    steps = [step("hangs", limit_s=0.5), timed, *map(step, names)]
    out = tmp_path / "first.json"
    result = first.run("cuda", out, steps)
    assert json.loads(out.read_text()) == result
    rows = result["steps"]
    statuses = ["timeout", "skipped", "failed", "failed", "failed", "skipped", "passed"]
    assert [row["status"] for row in rows] == statuses
    assert "exit code -11" in rows[2]["error"]
    assert "an unexpected error" in rows[3]["error"]
    assert rows[4]["error"] == "logits differ by 7.0"
    assert rows[6]["result"] == {"device": "cuda"}
    assert rows[1]["error"] == "not timed, as these steps failed: hangs, crashes, raises, is_wrong"
    text = out.with_suffix(".md").read_text()
    assert all(f"| {row['name']} | {row['status']} |" in text for row in rows)


@pytest.mark.usefixtures("stubs")
def test_timings_run_where_everything_before_passed_or_was_skipped(tmp_path: Path) -> None:
    steps = [step("passes"), step("lacks"), step("passes", timing=True)._replace(name="timed")]
    rows = first.run("cuda", tmp_path / "first.json", steps)["steps"]
    assert [row["status"] for row in rows] == ["passed", "skipped", "passed"]


def test_graphs_are_compared_with_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(first_steps.Skipped, match="not a GPU"):
        first_steps.graphs("cpu")
    monkeypatch.setattr(first_steps, "_GRAPH_TOKENS", 5)
    monkeypatch.setattr(decode_graph, "can_capture", lambda model: model.cuda_graphs)

    def eager(model: GptOss, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
        return decode_graph._logits(model, cache, tokens[:, None])

    class Graph:
        rows, end, shift = 3, 1000, 0.0

        def __init__(self, model: GptOss, cache: KVCache) -> None:
            self._own = model, cache

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = eager(*self._own, tokens)
            logits[-1, 40] += self.shift
            return logits

    monkeypatch.setattr(decode_graph, "DecodeGraph", Graph)
    assert first_steps.graphs("cpu")["tokens"] == "the same"
    monkeypatch.setattr(Graph, "shift", 1e4)  # the negative control
    with pytest.raises(JobError, match=r"other tokens with CUDA graphs on cpu, from these .*None, None, [01]"):
        first_steps.graphs("cpu")


def test_timings_come_last_and_every_step_exists() -> None:
    assert [s.timing for s in STEPS] == [False] * (len(STEPS) - 1) + [True]
    for s in STEPS:
        module, _, name = s.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_without_a_gpu_the_steps_are_listed_and_nothing_runs() -> None:
    listed = CliRunner().invoke(app, ["bench", "gpu", "--first", "--dry-run"])
    assert listed.exit_code == 0, listed.output
    assert all(s.name in listed.output for s in STEPS)
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(app, ["bench", "gpu", "--first"])
        assert refused.exit_code != 0


def test_nano_is_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_steps, "_QUESTIONS", ("12+30",))
    monkeypatch.setattr(first_steps, "_NEW_TOKENS", 4)
    machine = Machine()
    machine.pretend(monkeypatch)
    mxfp4._table.cache_clear()
    try:
        with machine:
            (row,) = first_steps.nano("cuda:0")["relative_errors"]
    finally:
        mxfp4._table.cache_clear()
    assert machine.devices == {torch.device("cuda", 0)}
    assert max(row["logits"], row["gradient"]) < first_steps._TOLERANCE
    monkeypatch.undo()
    monkeypatch.setattr(first_steps, "_NEW_TOKENS", 4)
    load = wb.load

    def broken(*args: Any, **options: Any) -> Any:
        """The negative control: the second model has a slightly wrong router."""
        model = load(*args, **options)
        loaded.append(model)
        if len(loaded) == 2:
            model.blocks[1].ln2.weight.data *= 1.01
        return model

    loaded: list[Any] = []
    monkeypatch.setattr(wb, "load", broken)
    with pytest.raises(JobError, match="nano"):
        first_steps.nano("cpu")


class Broken:
    """The negative control: a model whose logits are wrong where one argument or method is used."""

    def __init__(self, model: GptOss, what: str) -> None:
        self._model, self._what = model, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self._model(tokens, **options)
        return logits.roll(1, -1) if self._what in options else logits

    def run_with_hooks(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self._model.run_with_hooks(tokens, **options)
        return logits * (1 + 2**-7) if self._what == "hooks" else logits


@pytest.mark.parametrize(
    ("what", "message"),
    [("packed", "'packed'"), ("n_real", "'two rows'"), ("cache", "'continued'"), ("hooks", "attn.hook_sink")],
)
def test_variants_of_a_pass_are_compared_with_plain_passes(
    what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = wb.load
    monkeypatch.setattr(wb, "load", lambda *args, **options: Broken(load(*args, **options), what))
    with pytest.raises(JobError, match=message):
        first_steps.variants("cpu")


def test_what_a_recorder_copies_is_compared_with_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is read before it is finished holds other values."""
    copy = recorders._to_host
    monkeypatch.setattr(recorders, "_to_host", lambda x, dtype: copy(x, dtype) * (torch.arange(len(x)) < 100)[:, None])
    with pytest.raises(JobError, match=r"a recorder has copied from cpu differs .*blocks\.0\.hook_resid_post"):
        first_steps.variants("cpu")


def test_variants_agree_where_nothing_is_broken() -> None:
    result = first_steps.variants("cpu")
    assert max(result["relative_errors"].values()) < 1e-5
