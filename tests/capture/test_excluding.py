"""Excluding sequences when a run is read gives what excluding them during capture gives."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import workbench as wb
from workbench.cli import app
from workbench.dashboards import widgets
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.figures import report
from workbench.model.transformer import GptOss
from workbench.registry import find
from workbench.runs import Run
from workbench.studies import run_study

RECORD = ["routing", "sinks", "logprobs", "resid_post:1"]
EXCLUDE = "truncated,no_reasoning"


@pytest.fixture(scope="module")
def marked(transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transcripts, a third of which are truncated and lie between the others."""
    rows = [json.loads(line) for line in transcripts.read_text().splitlines()]
    for row in rows[::3]:
        row["complete"] = False
    path = tmp_path_factory.mktemp("t") / "marked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(nano: GptOss, marked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The whole run, and the run that was captured without the truncated sequences."""
    folder = tmp_path_factory.mktemp("r")
    every = wb.capture(nano, marked, folder / "every.zarr", record=RECORD, unit_tokens=1024)
    without_flagged = wb.capture(nano, marked, folder / "kept.zarr", record=RECORD, unit_tokens=1024, exclude=EXCLUDE)
    return every, without_flagged


def assert_same_reading(run: Run, other: Run) -> None:
    """The runs' tables, tokens, summaries and totals are equal, whatever the numbers of their sequences are."""
    assert list(run.sequences["id"]) == list(other.sequences["id"])
    assert run.messages.drop(columns="sequence").to_numpy().tolist() == (
        other.messages.drop(columns="sequence").to_numpy().tolist()
    )
    data, wanted = (r.dataset.drop_vars("sequence").compute() for r in (run, other))
    exact = ["id", "position", "channel", "experts"]
    xr.testing.assert_equal(data[exact].drop_attrs(), wanted[exact].drop_attrs())
    np.testing.assert_allclose(data["hook_resid_post"], wanted["hook_resid_post"], rtol=2e-2, atol=2e-2)
    for name in ("tokens", "expert_count"):
        np.testing.assert_array_equal(run.summary(name).values, other.summary(name).values)
        np.testing.assert_array_equal(run.total(name).values, other.total(name).values)
    np.testing.assert_allclose(run.total("sink_sum"), other.total("sink_sum"), rtol=1e-5)
    for name in ("coactivation", "transition"):
        np.testing.assert_array_equal(run.total(name).values, other.total(name).values)


def test_excluding_when_reading_equals_excluding_during_capture(runs: tuple[Run, Run]) -> None:
    every, without_flagged = runs
    assert 0 < len(without_flagged.sequences) < len(every.sequences)
    left = every.excluding(EXCLUDE)
    assert_same_reading(left, without_flagged)
    with pytest.raises(AssertionError):
        assert_same_reading(every, without_flagged)  # negative control
    assert left.digest != every.digest
    blocks = np.concatenate([block["id"] for block in left.blocks("id")])
    np.testing.assert_array_equal(blocks, left.dataset["id"])
    gone = len(every.sequences) - len(without_flagged.sequences)
    assert left.exclusion == f"{gone} of {len(every.sequences)} sequences excluded (truncated, no_reasoning)"
    with pytest.raises(InputError, match="is not in"):
        left.sequence(str(every.sequences["id"].iloc[0]))


def test_studies_say_what_was_excluded(runs: tuple[Run, Run]) -> None:
    every, without_flagged = runs
    left = every.excluding(EXCLUDE)
    result, wanted = (run_study("routing", run)["load"] for run in (left, without_flagged))
    np.testing.assert_array_equal(result["share"], wanted["share"])
    assert result.attrs["excluded"] == left.exclusion
    assert left.exclusion in result.attrs["summary"]
    assert "excluded" not in wanted.attrs


def test_commands_exclude(runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, _ = runs
    monkeypatch.setattr(report, "studies", lambda runs: [find("routing")])  # one study has the statement
    for command in (["summary"], ["study", "routing"], ["report", "--out", str(tmp_path / "r.html")]):
        name, *rest = command
        arguments = [name, *rest[:1], every.path, *rest[1:]] if name == "study" else [name, every.path, *rest]
        done = CliRunner().invoke(app, [*arguments, "--exclude", EXCLUDE])
        assert done.exit_code == 0, done.output
        shown = (tmp_path / "r.html").read_text() if name == "report" else done.output
        assert "sequences excluded (truncated" in " ".join(shown.split())


def test_what_cannot_be_excluded_is_refused(runs: tuple[Run, Run], demo_run: Path) -> None:
    every, _ = runs
    with pytest.raises(InputError, match="choose from irregular, truncated"):
        every.excluding("cut")
    with pytest.raises(InputError, match="leaves no sequence"):
        every.excluding("truncated").excluding(["re_rendered", "no_reasoning", "truncated"])
    with pytest.raises(InputError, match="stores no flags"):
        wb.open_run(demo_run, exclude="truncated")


def test_the_dashboard_excludes(runs: tuple[Run, Run], tmp_path: Path) -> None:
    every, _ = runs
    registry = RunRegistry([every.path], cache=tmp_path)
    try:
        left = Session(registry, Selection({"exclude": "truncated"}), lambda: None)
        assert left.run.exclusion.endswith("sequences excluded (truncated)")
        assert list(left.run.sequences["id"]) == list(every.excluding("truncated").sequences["id"])
        assert Session(registry, Selection({"exclude": "../x"}), lambda: None).run.exclusion == ""
        chooser = widgets.exclude(every, "")
        assert f"truncated ({len(every.sequences) - len(left.run.sequences)})" in chooser.options
        answer = registry.study("routing", registry.names[0], exclude="truncated")
        while (answered := answer()).datasets is None and not answered.reason:
            time.sleep(0.1)
        assert answered.datasets is not None, answered.reason
        assert answered.datasets["load"].attrs["excluded"] == left.run.exclusion
    finally:
        registry.jobs.close()
