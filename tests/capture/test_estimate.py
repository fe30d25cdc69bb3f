"""A plan says what a job will take, writes nothing, and refuses what cannot fit."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench as wb
from workbench.capture import estimate, job
from workbench.cli import app
from workbench.errors import InputError
from workbench.model.transformer import GptOss

RECORD = ["routing", "sinks", "logprobs", "resid_post:1", "attn.z:0 channel=analysis"]


def planned(nano: GptOss, transcripts: Path, path: Path) -> estimate.Estimate:
    return job.dry_run(nano, transcripts, path, record=RECORD, unit_tokens=1024)


def test_its_bytes_are_those_of_the_run_and_it_writes_nothing(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    plan = planned(nano, transcripts, tmp_path / "r")
    assert not list(tmp_path.iterdir())
    run = wb.capture(nano, transcripts, tmp_path / "r", record=RECORD, unit_tokens=1024)
    assert plan.units == run.progress[1]
    assert plan.done == 0
    assert plan.tokens == run.dataset.sizes["token"]
    assert plan.sequences == len(run.sequences)
    used = 0
    for name in ("tokens", "routing", "attention", "activations", "selected", "summaries"):
        for _, array in run.group[name].arrays():
            dims = array.metadata.dimension_names
            rows = plan.tokens / array.shape[dims.index("token")] if "token" in dims else 1
            used += round(array.size * array.dtype.itemsize * rows)
    assert plan.raw_bytes == used
    stored = sum(p.stat().st_size for p in (tmp_path / "r").rglob("c/**/*") if p.is_file())
    assert plan.disk_bytes == pytest.approx(stored, rel=0.6)
    each = {name: size for name, size in plan.per_token.items() if name == "routing"}
    assert each == {"routing": 4 * 4 * 3}
    again = planned(nano, transcripts, tmp_path / "r")
    assert (again.done, again.tokens, again.raw_bytes) == (plan.units, 0, 0)


def test_what_cannot_fit_is_refused_before_anything_is_written(
    nano: GptOss, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 10_000)
    plan = planned(nano, transcripts, tmp_path / "r")
    assert not plan.fits
    with pytest.raises(InputError, match="are to be written and the disk has"):
        estimate.refuse_what_cannot_fit(plan, tmp_path / "r")
    with pytest.raises(InputError, match="the disk has"):
        wb.capture(nano, transcripts, tmp_path / "r", record=RECORD, unit_tokens=1024)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_plan(transcripts: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["capture", "nano", str(transcripts), str(tmp_path / "r"), "--dry-run"])
    assert said.exit_code == 0, said.output
    for words in ("units", "bytes a token", "disk free", "tokens/s"):
        assert words in said.output
    assert not (tmp_path / "r").exists()
    url = CliRunner().invoke(app, ["capture", "nano", str(transcripts), "memory://plan/r", "--dry-run"])
    assert url.exit_code == 0
    assert "unknown" in url.output


def test_a_job_into_memory_is_read_and_verified_there_and_not_shared(
    nano: GptOss, transcripts: Path, tmp_path: Path
) -> None:
    from workbench.runs.verify import verify

    local = wb.capture(nano, transcripts, tmp_path / "r", unit_tokens=1024)
    run = wb.capture(nano, transcripts, "memory://jobs/r.zarr", unit_tokens=1024)
    assert not verify("memory://jobs/r.zarr")
    assert np.array_equal(run.dataset["experts"], local.dataset["experts"])
    with pytest.raises(InputError, match="seen by one process alone"):
        wb.capture(nano, transcripts, "memory://jobs/other.zarr", unit_tokens=1024, workers=2)


def test_sinks_as_sums_alone(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    from workbench.runs.verify import verify

    whole = wb.capture(nano, transcripts, tmp_path / "whole", record=["sinks"], unit_tokens=1024)
    sums = wb.capture(nano, transcripts, tmp_path / "sums", record=["sink_sums"], unit_tokens=1024)
    assert "sink" not in sums.dataset
    assert "attention" not in sums.group
    for name in ("sink_sum", "sink_sumsq"):
        assert np.array_equal(sums.summary(name), whole.summary(name))
        assert np.array_equal(sums.total(name), whole.total(name))
    assert not verify(tmp_path / "sums")
