"""Runs in object stores keep every promise that runs in folders keep: memory://, and an S3 server of a third party."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.runs.conftest import job, write_run
from tests.runs.test_lock import compete
from tests.serving import free_port, wait_for
from tests.test_outputs import interrupt_every_step
from workbench import outputs
from workbench.capture.plan import plan_units
from workbench.errors import InputError
from workbench.runs.lock import LOCK, Lock
from workbench.runs.reader import open_run
from workbench.runs.storage import ROOT, LocalStorage, ObjectStorage, storage_at
from workbench.runs.verify import verify
from workbench.runs.writer import open_writer

LENGTHS = (700, 900, 20, 600)  # three units: an object is a request, and these are thousands
LAYOUT = plan_units(LENGTHS, 1024)
KEY = "testing-key-that-nobody-may-see"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a server in a process of its own; found by environment variables, as a user's is."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.runs.s3_server", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        wait_for(port, server)
        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    root = "memory://runs" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{uuid.uuid4().hex}/run é.zarr"


def contents(where: str | Path) -> dict[str, bytes]:
    there = storage_at(where)
    return {key: there.read(key) for key in there.files() if key != LOCK}


def test_a_run_in_a_bucket_equals_one_in_a_folder(url: str, tmp_path: Path) -> None:
    write_run(url, units=[2, 0], lengths=LENGTHS)
    assert open_run(url).progress == (2, len(LAYOUT.units))
    write_run(url, lengths=LENGTHS)
    write_run(tmp_path / "r", lengths=LENGTHS)
    assert contents(url) == contents(tmp_path / "r")
    assert not verify(url)
    run, local = open_run(url), open_run(tmp_path / "r")
    assert run.digest == local.digest
    assert run.sequences.equals(local.sequences)
    np.testing.assert_array_equal(run.dataset["experts"].to_numpy(), local.dataset["experts"].to_numpy())
    np.testing.assert_array_equal(run.summary("expert_count"), local.summary("expert_count"))


def test_damage_in_a_bucket_is_found(url: str) -> None:
    write_run(url, lengths=LENGTHS)
    there = storage_at(url)
    shard = next(key for key in sorted(there.files()) if key.startswith("routing/experts/c/"))
    data = bytearray(there.read(shard))
    data[len(data) // 3] ^= 4
    there.put(shard, [bytes(data)])
    assert any("routing/experts" in p.what for p in verify(url))
    there.delete(shard)
    assert any("is missing" in p.what for p in verify(url))


def test_the_root_comes_last_and_a_torn_creation_is_begun_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, written = ObjectStorage.put, []

    def dies(self: ObjectStorage, key: str, parts: list[bytes]) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(key)
        put(self, key, parts)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "put", dies)
        with pytest.raises(KeyboardInterrupt):
            open_writer(url, **job(LAYOUT))
    assert written
    assert ROOT not in written
    with pytest.raises(InputError, match="is not a run"):
        open_run(url)
    write_run(url, lengths=LENGTHS)
    assert not verify(url)
    assert ".creating" not in storage_at(url).files()


def create(path: Path, text: str, overwrite: bool = False) -> None:
    """Create a run, or replace one, as the writer does."""
    storage = LocalStorage(path)
    with storage.lock(), storage.new() as folder:
        folder.mkdir()
        (folder / ROOT).write_text(text)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_at_every_step_leaves_the_old_run_or_the_new_one(tmp_path: Path, moment: str) -> None:
    left = interrupt_every_step(tmp_path, create, moment)
    assert len(left) > 5
    for files in left:
        assert [name for name in files if name.endswith(".staging")] == [], files
        assert files["out/zarr.json"] in ("old", "new"), files


def test_a_run_that_an_interruption_loses_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what was set aside is removed with the staging folder."""
    monkeypatch.setattr(outputs, "_remove_staging", lambda folder, path: shutil.rmtree(folder, ignore_errors=True))
    left = interrupt_every_step(tmp_path, create, "after")
    assert any("out/zarr.json" not in files for files in left)


def test_a_run_that_a_killed_job_set_aside_is_moved_back(tmp_path: Path) -> None:
    """The job was killed between two renames; the next one was not told to replace a run, as it saw none."""
    aside = tmp_path / ".out.1234.staging" / ".replaced"
    create(aside, "old")
    with pytest.raises(InputError, match="is back, which a killed job was about to replace"):
        create(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {ROOT: b"old"}
    create(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out") == {ROOT: b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_a_run_is_left_alone(url: str) -> None:
    there = storage_at(url)
    there.put("thesis.txt", [b"mine"])
    with pytest.raises(InputError, match=r"not a run \(thesis.txt\)"):
        open_writer(url, **job(LAYOUT))
    assert there.files() == {"thesis.txt"}
    with pytest.raises(InputError, match=r"(does not exist|is not a run)"):
        open_run(f"{url}/nothing")


def test_a_second_job_is_refused_and_a_dead_one_s_lock_taken_over(url: str) -> None:
    with (
        open_writer(url, **job(LAYOUT)),
        pytest.raises(InputError, match=rf"{url} is being written by process {os.getpid()} on .* since 20"),
    ):
        open_writer(url, **job(LAYOUT)).__enter__()
    code = "import sys; from workbench.runs.lock import Lock; from workbench.runs.storage import storage_at; "
    code += "Lock(storage_at(sys.argv[1])).acquire(); import os; os._exit(9)"
    if url.startswith("s3"):
        subprocess.run([sys.executable, "-c", code, url], check=False)
        assert storage_at(url).exists(LOCK)
    write_run(url, lengths=LENGTHS)
    assert not storage_at(url).exists(LOCK)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_of_several_jobs_at_a_lock_in_a_bucket_one_goes_on(s3: str, processes: int, long: bool) -> None:
    """The lock is new and one that a killed job left, in turn."""
    trials = 2000 if long else 6
    assert compete("mixed", f"{s3}/{uuid.uuid4().hex}", processes, trials) == {"1": trials}


def test_the_trials_find_a_lock_in_a_bucket_that_looks_before_it_writes(s3: str) -> None:
    """The negative control: a put without a condition."""
    assert compete("broken", f"{s3}/{uuid.uuid4().hex}", 2, 10).get("1", 0) < 10


def test_one_of_two_takes_the_lock(url: str) -> None:
    Lock(storage_at(url)).acquire()
    assert not storage_at(url).create(LOCK, b"{}")


INTERRUPTED = (*LENGTHS, 1000, 1024)  # five units
CHILD = f"""
import sys
from tests.runs.conftest import job, write_unit
from workbench.capture.plan import plan_units
from workbench.runs.writer import open_writer
with open_writer(sys.argv[1], **job(plan_units({INTERRUPTED}, 1024))) as writer:
    for index in writer.pending():
        write_unit(writer, index)
        print(index, flush=True)
    writer.finish()
"""


def test_killed_in_a_bucket_and_begun_again(s3: str, tmp_path: Path) -> None:
    url = f"{s3}/{uuid.uuid4().hex}/r"
    for kill_after in (0, 0, 1, None):
        with subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            if kill_after is None:
                assert child.wait() == 0
                break
            for _ in range(kill_after + 1):
                child.stdout.readline()
            time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
    assert not verify(url)
    write_run(tmp_path / "straight", lengths=INTERRUPTED)
    assert contents(url) == contents(tmp_path / "straight")
    assert not any(KEY.encode() in data for data in contents(url).values())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://b/r", "unknown scheme 'nowhere'"),
        ("https://example.org/r.zarr", "web server"),
        ("gs://b/r", "needs a package that is not installed"),
    ],
)
def test_what_cannot_be_reached_is_one_line(url: str, message: str) -> None:
    for opener in (open_run, lambda where: open_writer(where, **job(LAYOUT))):
        with pytest.raises(InputError, match=message) as raised:
            opener(url)
        assert "\n" not in str(raised.value)


class NoCredentialsError(Exception):
    """An error of a client's own, as botocore's: neither an OSError nor a ValueError."""


@pytest.mark.parametrize("check", [verify, open_run])
def test_a_storage_that_cannot_be_opened_is_no_damaged_run(
    check: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run("memory://credentials/run", lengths=(700,))  # type: ignore[arg-type]
    check("memory://credentials/run")  # negative control: with access the run is read

    def refuse(*_: object, **__: object) -> bool:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(fsspec.filesystem("memory"), "exists", refuse)
    if check is open_run:
        with pytest.raises(InputError, match="cannot be opened: Unable to locate credentials; credentials and"):
            open_run("memory://credentials/run")
    else:
        (problem,) = verify("memory://credentials/run")
        assert "damaged" not in problem.what
