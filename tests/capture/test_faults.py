"""Whatever happens to a job, nothing is lost, and what it ends with is what an undisturbed one ends with."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import workbench as wb
from tests.capture.killing import RECORD
from tests.conftest import DATA
from tests.runs.test_storage import s3  # noqa: F401
from workbench.capture import pipeline, record_buffers
from workbench.errors import InputError, JobError
from workbench.model.transformer import GptOss
from workbench.runs import shards
from workbench.runs.storage import Storage, storage_at
from workbench.runs.verify import verify
from workbench.runs.writer import RunWriter
from workbench.signals import StopSignal

Stored = Callable[[Path], dict[str, bytes]]
OPTIONS: dict[str, Any] = dict(record=RECORD, unit_tokens=1024)


@pytest.fixture(scope="module")
def undisturbed(nano: GptOss, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    wb.capture(nano, transcripts, path, **OPTIONS)
    assert verify(path) == []
    assert wb.open_run(path).progress[1] >= 3, "the tests need several units"
    return path


def command(transcripts: Path, path: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "workbench.cli",
        "capture",
        "nano",
        str(transcripts),
        str(path),
        "--dtype",
        "float32",
        "--unit-tokens",
        "1024",
        *(f"--record={name}" for name in RECORD),
        *more,
    ]


def kill(folder: Path, **kinds: int) -> dict[str, Any]:
    """Kill commands of some kinds at random moments, each so often, by SIGKILL and SIGINT in turn.

    Return by kind the number of kills and of outputs that came to their end, or why it failed.
    """
    script = [sys.executable, "-m", "tests.capture.killing", str(folder), "0", "both"]
    script += [f"{kind}={kills}" for kind, kills in kinds.items()]
    done = subprocess.run(
        script, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def outputs_of(killed: dict[str, Any], kind: str) -> int:
    """Return how many outputs of a kind came to their end."""
    assert not isinstance(killed[kind], str), killed[kind]
    outputs = int(killed[kind][1])
    assert outputs >= 1
    return outputs


@pytest.fixture(scope="module")
def killed(
    transcripts: Path, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, long: bool
) -> tuple[Path, dict[str, Any]]:
    """Commands of all kinds, killed by one process: it takes long to import what they need."""
    folder = tmp_path_factory.mktemp("killed")
    for kind in ("capture", "finetune", "branching", "generate", "transcripts"):
        (folder / kind).mkdir()
    for kind in ("capture", "finetune"):
        shutil.copy(transcripts, folder / kind / "transcripts.jsonl")
    for kind in ("generate", "transcripts"):
        prompts = (DATA / "prompts.jsonl").read_text().splitlines(True)[:3]
        (folder / kind / "prompts.jsonl").write_text("".join(prompts))
    shutil.copytree(undisturbed, folder / "branching" / "run.zarr")
    often = (50, 30, 30, 50, 50) if long else (8, 3, 3, 4, 4)
    # transcripts last: their mock server is a thread
    kinds = dict(zip(("capture", "finetune", "branching", "generate", "transcripts"), often, strict=True))
    results = kill(folder, **kinds)
    assert {kind: result[0] for kind, result in results.items() if not isinstance(result, str)}.items() <= kinds.items()
    return folder, results


def leftovers(folder: Path, kind: str, unfinished: int | None = None) -> list[str]:
    """Names in a folder that are no input, output or log: a lock of the last job that was killed may be there.

    unfinished: an output that is not looked at, as nobody resumed it.
    """
    names = (path.name for path in folder.iterdir())
    inputs = r"prompts\.jsonl|transcripts\.jsonl|run\.zarr|stderr"
    own = rf"{kind}-\d+(\.jsonl|\.log)?|{inputs}|\.{kind}-\d+.*\.lock|\.{kind}-\d+\.workbench"
    own += "" if unfinished is None else rf"|\.?{kind}-{unfinished}\..*"
    return [name for name in names if not re.fullmatch(own, name)]


@pytest.mark.slow
def test_kills_of_a_capture_at_random_moments_lose_nothing(
    nano: GptOss, killed: tuple[Path, dict[str, Any]], undisturbed: Path, stored: Stored
) -> None:
    folder, outputs = killed[0] / "capture", outputs_of(killed[1], "capture")
    last = folder / f"capture-{outputs}"
    wb.capture(nano, folder / "transcripts.jsonl", last, **OPTIONS)
    want = stored(undisturbed)
    for number in range(outputs + 1):
        assert stored(folder / f"capture-{number}") == want, number
    assert not leftovers(folder, "capture")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generate", "transcripts"])
def test_kills_of_a_file_of_rows_lose_nothing(killed: tuple[Path, dict[str, Any]], kind: str) -> None:
    """Files that were interrupted and those that were not are the same, to the byte, but for the time of an answer."""
    folder, outputs = killed[0] / kind, outputs_of(killed[1], kind)
    texts = {re.sub(r'"date": "[^"]*"', "", (folder / f"{kind}-{n}.jsonl").read_text()) for n in range(outputs)}
    assert len(texts) == 1
    (text,) = texts
    assert [json.loads(line)["id"].split("/")[1] for line in text.splitlines()] == ["low", "medium", "high"] * 3
    assert not leftovers(folder, kind)


def written(folder: Path, name: str) -> dict[str, bytes]:
    """Return the files of an output that is a folder or a file, and of what lies beside it by the same name."""
    contents = {}
    for path in sorted(folder.glob(f"{name}*")):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                contents[str(file.relative_to(folder)).replace(name, "OUT")] = file.read_bytes().replace(
                    name.encode(), b"OUT"
                )
    return contents


@pytest.mark.slow
def test_kills_of_a_training_lose_nothing(killed: tuple[Path, dict[str, Any]]) -> None:
    """The weights and the losses of every adapter are those of a training that nobody disturbed."""
    folder, outputs = killed[0] / "finetune", outputs_of(killed[1], "finetune")
    outputs_written = [written(folder, f"finetune-{number}") for number in range(outputs)]
    assert {"OUT/adapter_model.safetensors", "OUT/training.json"} <= outputs_written[0].keys()
    assert all(one == outputs_written[0] for one in outputs_written)
    assert not leftovers(folder, "finetune", outputs)


@pytest.mark.slow
def test_kills_of_a_study_of_branches_lose_nothing(killed: tuple[Path, dict[str, Any]]) -> None:
    """The stored continuations and the tables of every study are those of one that nobody disturbed."""
    folder, outputs = killed[0] / "branching", outputs_of(killed[1], "branching")
    outputs_written = [written(folder, f"branching-{number}") for number in range(outputs)]
    assert "OUT.jsonl" in outputs_written[0]
    assert any(name.startswith("OUT/") and name.endswith(".csv") for name in outputs_written[0])
    assert all(one == outputs_written[0] for one in outputs_written)
    assert not leftovers(folder, "branching", outputs)


@pytest.mark.long
def test_kills_of_a_capture_by_workers_lose_nothing(
    nano: GptOss, transcripts: Path, undisturbed: Path, tmp_path: Path, stored: Stored
) -> None:
    folder = tmp_path / "workers"
    folder.mkdir()
    shutil.copy(transcripts, folder / "transcripts.jsonl")
    outputs = outputs_of(kill(tmp_path, workers=20), "workers")
    wb.capture(nano, transcripts, folder / f"workers-{outputs}", **OPTIONS)
    for number in range(outputs + 1):
        assert stored(folder / f"workers-{number}") == stored(undisturbed), number


@pytest.mark.long
def test_kills_of_a_capture_into_s3_lose_nothing(
    nano: GptOss,
    transcripts: Path,
    undisturbed: Path,
    tmp_path: Path,
    stored: Stored,
    s3: str,  # noqa: F811
) -> None:
    (tmp_path / "s3").mkdir()
    shutil.copy(transcripts, tmp_path / "s3" / "transcripts.jsonl")
    outputs = outputs_of(kill(tmp_path, s3=30), "s3")
    wb.capture(nano, transcripts, f"{s3}/s3-{outputs}", **OPTIONS)
    for number in range(outputs + 1):
        storage = storage_at(f"{s3}/s3-{number}")
        assert {key: storage.read(key) for key in storage.files() if key != "zarr.json"} == stored(undisturbed), number


HELD_AT_THE_SECOND_UNIT = """
import os, sys, time
from workbench.capture import pipeline
compute, units = pipeline.compute, []
def held(*arguments):
    units.append(arguments)
    while len(units) > 1 and not os.path.exists("{signalled}"):
        time.sleep(0.01)
    return compute(*arguments)
pipeline.compute = held
sys.argv = ["workbench", *sys.argv[1:]]
from workbench.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_job_cleanly_and_states_how_to_go_on(
    nano: GptOss, transcripts: Path, undisturbed: Path, tmp_path: Path, stored: Stored, number: signal.Signals
) -> None:
    path = tmp_path / "run"
    code = HELD_AT_THE_SECOND_UNIT.format(signalled=tmp_path / "signalled")
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command(transcripts, path)[3:]], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not list(path.glob("units/committed/c/*")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    (tmp_path / "signalled").touch()
    _, err = child.communicate(timeout=600)
    assert child.returncode == 1, err
    assert (
        f"was stopped by {number.name}; what was written is saved: rerun the command to resume" in err.splitlines()[-1]
    )
    assert not path.with_name(".run.lock").exists()
    run = wb.open_run(path)
    assert 0 < run.progress[0] < run.progress[1]
    assert verify(path) == []
    wb.capture(nano, transcripts, path, **OPTIONS)
    assert stored(path) == stored(undisturbed)
    log_text = Path(f"{path}.log").read_text()
    assert f"stopped by {number.name}" in log_text
    assert log_text.rstrip().endswith("complete")


def test_a_second_signal_is_not_caught() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores SIGINT
    try:
        with StopSignal("the job") as interrupt:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(JobError, match="the job was stopped by SIGINT"):
                interrupt.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_leaves_its_unit_out_and_the_job_goes_on_later(
    nano: GptOss, transcripts: Path, undisturbed: Path, tmp_path: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, put = tmp_path / "run", shards._put

    def full(array: Any, where: Storage, key: str, values: np.ndarray) -> Any:
        if key == "routing/gates/c/0/1/0":  # the second unit's
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(array, where, key, values)

    monkeypatch.setattr(shards, "_put", full)
    with pytest.raises(JobError, match=r"disk of .* is full; free some space, then rerun the command"):
        wb.capture(nano, transcripts, path, **OPTIONS)
    assert wb.open_run(path).committed.tolist()[:2] == [True, False]
    monkeypatch.undo()
    wb.capture(nano, transcripts, path, **OPTIONS)
    assert stored(path) == stored(undisturbed)


def test_a_slow_disk_holds_the_model_back_and_memory_stays(
    nano: GptOss, transcripts: Path, undisturbed: Path, tmp_path: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made, waiting, most = RunWriter.write_unit, [], set(), 0
    init = record_buffers.Buffers.__init__
    compute = pipeline.compute

    def counted(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    def slow(self: RunWriter, index: int, *rest: Any) -> None:
        time.sleep(0.3)
        write(self, index, *rest)
        waiting.discard(index)

    def noted(model: GptOss, unit: Any, *rest: Any) -> Any:
        nonlocal most
        waiting.add(unit.index)
        most = max(most, len(waiting))
        return compute(model, unit, *rest)

    monkeypatch.setattr(record_buffers.Buffers, "__init__", counted)
    monkeypatch.setattr(RunWriter, "write_unit", slow)
    monkeypatch.setattr(pipeline, "compute", noted)
    wb.capture(nano, transcripts, tmp_path / "run", **OPTIONS)
    assert len(made) == pipeline.IN_FLIGHT
    assert most <= pipeline.IN_FLIGHT
    assert stored(tmp_path / "run") == stored(undisturbed)


def test_two_jobs_at_once_are_one_too_many(
    nano: GptOss, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    compute = pipeline.compute

    def held(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(300)
        return compute(*args)

    monkeypatch.setattr(pipeline, "compute", held)
    first = threading.Thread(target=lambda: wb.capture(nano, transcripts, tmp_path / "run", **OPTIONS))
    first.start()
    assert begun.wait(300)
    with pytest.raises(InputError, match=rf"being written by process {os.getpid()} on .* since 20\d\d-"):
        wb.capture(nano, transcripts, tmp_path / "run", **OPTIONS)
    go_on.set()
    first.join()
    assert wb.open_run(tmp_path / "run").status == "complete"


@pytest.mark.slow
def test_a_killed_worker_costs_its_unit_only(
    nano: GptOss, transcripts: Path, undisturbed: Path, tmp_path: Path, stored: Stored
) -> None:
    path = tmp_path / "run"
    job = subprocess.Popen(command(transcripts, path, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 600
    while not list(path.glob("tokens/id/c/*")) and time.monotonic() < deadline and job.poll() is None:
        if not workers:
            with contextlib.suppress(psutil.NoSuchProcess):  # a process of the job that ended meanwhile
                children = psutil.Process(job.pid).children(recursive=True)
                workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.005)
    assert workers, "no worker was found"
    with contextlib.suppress(psutil.NoSuchProcess):  # the job may be done by then
        workers[0].send_signal(signal.SIGKILL)
    _, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert stored(path) == stored(undisturbed)
    assert verify(path) == []


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """A scheduler and a worker of their own, as on other machines."""
    begin = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        "0",
        "--no-dashboard",
        "--host",
        "127.0.0.1",
    ]
    scheduler = subprocess.Popen(begin, stderr=subprocess.PIPE, text=True)
    address = ""
    assert scheduler.stderr is not None
    while not address:
        line = scheduler.stderr.readline()
        assert line, "the scheduler ended"
        address = (re.findall(r"Scheduler at:\s+(tcp://\S+)", line) or [""])[0]
    rest = threading.Thread(target=scheduler.stderr.read, daemon=True)
    rest.start()
    begin = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    worker = subprocess.Popen(begin, stderr=subprocess.DEVNULL, text=True)
    yield address, [scheduler, worker]
    for process in (worker, scheduler):
        process.terminate()
        process.wait(300)
    rest.join(300)
    scheduler.stderr.close()


@pytest.mark.slow
def test_a_lost_scheduler_ends_the_job_and_the_next_goes_on(
    nano: GptOss,
    transcripts: Path,
    undisturbed: Path,
    tmp_path: Path,
    stored: Stored,
    cluster: tuple[str, list[subprocess.Popen[str]]],
) -> None:
    address, (scheduler, _) = cluster
    path = tmp_path / "run"
    job = subprocess.Popen(command(transcripts, path, "--dask", address), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(path.glob("units/committed/c/*")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.005)
    scheduler.kill()
    _, err = job.communicate(timeout=600)
    if job.returncode != 0:  # it may have been done by then
        assert job.returncode == 1, err
        assert "scheduler" in err.splitlines()[-1]
        assert "rerun the command to resume" in err.splitlines()[-1]
    wb.capture(nano, transcripts, path, **OPTIONS)
    assert stored(path) == stored(undisturbed)


def test_an_address_where_nobody_answers_is_refused(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--dask tcp://127.0.0.1:1: no scheduler answers there"):
        wb.capture(nano, transcripts, tmp_path / "run", dask="tcp://127.0.0.1:1")


def test_one_row_in_twenty_may_be_bad(nano: GptOss, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Unicode, empty, too long, not JSON: the good rows are captured, the bad ones are listed with their lines."""
    good = [{**rows[i % len(rows)], "id": f"row {i} ✓"} for i in range(95)]
    long = [5] * (nano.cfg.n_ctx + 1)
    bad = [
        "{",
        json.dumps({**rows[0], "id": "empty", "messages": []}),
        json.dumps({**rows[0], "id": "\ud800"}),
        json.dumps({"id": "long", "prompt_id": "x", "effort": "low", "tokens": long, "n_prompt": 1}),
        json.dumps({"id": "none", "prompt_id": "x", "effort": "low", "tokens": [], "n_prompt": 0}),
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in good]
    for place, line in zip((3, 20, 41, 62, 99), bad, strict=True):
        lines.insert(place, line)
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    run = wb.capture(nano, path, tmp_path / "run", unit_tokens=1024)
    assert len(run.sequences) == 95
    assert [reject["line"] for reject in run.provenance["rejects"]] == [4, 21, 42, 63, 100]
    assert verify(tmp_path / "run") == []


def test_a_sequence_longer_than_a_unit_gets_one_of_its_own(tmp_path: Path) -> None:
    model = wb.load("nano", dtype=torch.float32)
    model.cfg = replace(model.cfg, n_ctx=4096)
    rng, path = random.Random(0), tmp_path / "t.jsonl"
    rows = [
        {"id": str(i), "prompt_id": str(i), "effort": "", "tokens": rng.choices(range(5, 70), k=n), "n_prompt": 1}
        for i, n in enumerate([30, 1100, 1, 500])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = wb.capture(model, path, tmp_path / "run", unit_tokens=1024, record=["routing", "resid_post:0"])
    assert [unit.capacity for unit in run.layout.units] == [1024, 2048]
    assert verify(tmp_path / "run") == []
