"""Studies run in the background, are cached beside the run, and read again; no temporary file remains."""

import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from tests.runs.conftest import LENGTHS, job, write_unit
from workbench.capture.plan import plan_units
from workbench.child_processes import python
from workbench.dashboards import study_jobs
from workbench.dashboards.state import RunRegistry
from workbench.dashboards.study_jobs import Answer, StudyJobs
from workbench.runs import Run
from workbench.runs.writer import open_writer
from workbench.studies import run_study
from workbench.studies.result import load


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


def wait_for(jobs: StudyJobs, *asked: Any, **how: Any) -> Answer:
    for _ in range(6000):  # ten minutes: nothing here depends on the machine being fast
        answer = jobs.ask(*asked, **how)
        if answer.datasets is not None or answer.reason:
            return answer
        time.sleep(0.1)
    pytest.fail("the study was never made")


def test_a_study_is_made_beside_kept_and_read_back(tmp_path: Path, run: Run) -> None:
    jobs = StudyJobs(tmp_path)
    assert jobs.ask("effort", [run.path], run.digest).datasets is None  # nobody waits
    made = wait_for(jobs, "effort", [run.path], run.digest)
    assert made.datasets is not None
    here = run_study("effort", run)
    assert made.datasets.keys() == here.keys()
    for name, ds in here.items():
        xr.testing.assert_allclose(made.datasets[name], ds)
        assert made.datasets[name].attrs == ds.attrs
    jobs.close()
    second = StudyJobs(tmp_path)
    second._make = lambda *_: pytest.fail("made again")  # type: ignore[method-assign]
    assert wait_for(second, "effort", [run.path], run.digest).datasets is not None
    second.close()


def test_what_a_run_cannot_carry_is_said_and_half_a_study_is_not_kept(tmp_path: Path, run: Run) -> None:
    jobs = StudyJobs(tmp_path)
    answer = wait_for(jobs, "routing", [str(tmp_path / "none.zarr")], "digest")
    assert "does not exist" in answer.reason
    assert not list(tmp_path.rglob("routing*"))
    jobs.ask("routing", [run.path], run.digest)
    for _ in range(100):
        if jobs._running:
            break
        time.sleep(0.05)
    jobs.close()  # as a server that is ended in the middle
    time.sleep(1)
    assert not [p for p in tmp_path.rglob("routing") if p.is_dir()]


def test_no_temporary_folder_remains(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the study of a run that grows needs one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    jobs = StudyJobs(tmp_path / "cache")
    wait_for(jobs, "channels", [run.path], run.digest)
    assert not list((tmp_path / "scratch").glob("workbench-studies-*"))
    wait_for(jobs, "channels", [run.path], run.digest + "grown", lasting=False)
    assert list((tmp_path / "scratch").glob("workbench-studies-*/*/channels"))
    jobs.close()
    assert not list((tmp_path / "scratch").glob("workbench-studies-*"))


def test_a_growing_run_is_studied_once_for_each_visit(tmp_path: Path) -> None:
    layout = plan_units(LENGTHS, 1024)
    with open_writer(tmp_path / "r.zarr", **job(layout)) as writer:
        write_unit(writer, 0)
        registry = RunRegistry([tmp_path / "r.zarr"], cache=tmp_path / "cache")
        asked = list[tuple[str, bool]]()
        registry.jobs.ask = lambda study, paths, digest, *, exclude, lasting: asked.append((digest, lasting))  # type: ignore[assignment,method-assign]
        session = registry.study("routing", "r")
        first = registry.run("r").digest
        session()
        write_unit(writer, 1)
        assert registry.run("r").digest != first
        session()
        assert asked == [(first, False)] * 2
        registry.study("routing", "r")()
        assert asked[2][0] != first
        registry.jobs.close()


def test_few_results_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were asked for last; one that was dropped is read again."""
    monkeypatch.setattr(study_jobs, "_IN_MEMORY", 2)
    jobs, read = StudyJobs(tmp_path), list[str]()

    def get(study: str, *_: Any) -> dict[str, xr.Dataset]:
        read.append(study)
        return {study: xr.Dataset()}

    monkeypatch.setattr(jobs, "_get", get)
    for study in ("a", "b", "a", "c", "a", "b"):
        assert list(wait_for(jobs, study, ["r.zarr"], "digest").datasets or ()) == [study]
    jobs.close()
    assert read == ["a", "b", "c", "b"]


def test_a_study_is_cached_though_its_server_was_killed(tmp_path: Path, run: Run) -> None:
    """The process of the study ends its work alone; the negative control is one that is killed before its end."""
    cached, made = tmp_path / "study", tmp_path / "made"
    arguments = ("routing", str(made), str(cached), "", "{}", str(run.path))
    for finishes in (False, True):
        made.mkdir(exist_ok=True)
        process = subprocess.Popen(python("-m", "workbench.dashboards.study_jobs", *arguments))
        if not finishes:
            process.kill()
        assert process.wait(300) == (0 if finishes else -signal.SIGKILL)
        assert cached.exists() == finishes
    assert load(cached)["routing"]


def test_a_folder_that_another_server_has_made_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = StudyJobs(tmp_path)

    def run_command(*command: str) -> None:
        out = Path(command[-1])
        for place in (out, out.parents[1] / out.name):
            place.mkdir()
            (place / "result").write_text("values")

    monkeypatch.setattr(jobs, "_run", run_command)
    cached = jobs._cached("digest", "a-result", lambda out: [out])
    assert (cached / "result").read_text() == "values"
    assert [place.name for place in cached.parent.iterdir()] == ["a-result"], "no temporary folder is left"
    monkeypatch.setattr(jobs, "_run", lambda *command: None)
    with pytest.raises(OSError, match="No such file"):  # negative control: nothing was written by either
        jobs._cached("digest", "another-result", lambda out: [out])
