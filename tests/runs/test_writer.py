"""Units commit atomically, a resumed run equals an uninterrupted one, and what does not fit is refused."""

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.runs.conftest import LENGTHS, MODEL, SPEC, job, unit_data, write_run, write_unit
from workbench.capture.plan import plan_units
from workbench.errors import InputError, JobError
from workbench.runs import shards
from workbench.runs.lock import LOCK
from workbench.runs.reader import open_run
from workbench.runs.schema import SCHEMA, Activation, Spec
from workbench.runs.storage import Storage
from workbench.runs.summaries import summarise
from workbench.runs.verify import verify
from workbench.runs.writer import open_writer

LAYOUT = plan_units(LENGTHS, 1024)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != LOCK}


def test_a_resumed_run_is_byte_for_byte_an_uninterrupted_one(tmp_path: Path) -> None:
    write_run(tmp_path / "straight")
    write_run(tmp_path / "broken", units=[3, 0])
    write_run(tmp_path / "broken", units=[4])
    write_run(tmp_path / "broken")
    assert contents(tmp_path / "straight") == contents(tmp_path / "broken")


def test_a_unit_interrupted_before_its_flag_is_invisible_and_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    write_run(path, units=[0])
    with open_writer(path, **job(LAYOUT)) as writer:
        tokens, records = unit_data(LAYOUT, LAYOUT.units[1])
        sums = summarise(records, tokens["sequence"], tokens["channel"], num_experts=8)
        original = shards._put

        def dies(array: Any, where: Storage, key: str, values: np.ndarray) -> None:
            if "attention/sink" in key:
                raise KeyboardInterrupt
            original(array, where, key, values)

        monkeypatch.setattr(shards, "_put", dies)
        with pytest.raises(KeyboardInterrupt):
            writer.write_unit(1, tokens, records, sums)
        monkeypatch.undo()
    assert open_run(path).progress == (1, len(LAYOUT.units))
    write_run(path)
    write_run(tmp_path / "straight")
    assert contents(path) == contents(tmp_path / "straight")


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write_run(path, units=[0])
    torn = path / "units" / "committed" / "c" / "1.0f3c.partial"
    torn.write_bytes(b"")
    write_run(path)
    assert not torn.exists()
    write_run(tmp_path / "straight")
    assert contents(path) == contents(tmp_path / "straight")


def test_threads_may_write_different_units(tmp_path: Path) -> None:
    write_run(tmp_path / "straight")
    with open_writer(tmp_path / "r", **job(LAYOUT)) as writer:
        threads = [threading.Thread(target=write_unit, args=(writer, i)) for i in writer.pending()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    assert contents(tmp_path / "r") == contents(tmp_path / "straight")


def test_no_two_units_share_a_file(tmp_path: Path) -> None:
    """What makes writers safe without locks: a unit touches no file that another one does."""
    path = tmp_path / "r"
    write_run(path, units=[])
    before = contents(path)
    owners: dict[str, int] = {}
    with open_writer(path, **job(LAYOUT)) as writer:
        for index in range(len(LAYOUT.units)):
            write_unit(writer, index)
            after = contents(path)
            for name in after:
                if before.get(name) != after[name]:
                    assert name not in owners, f"{name} is written by units {owners[name]} and {index}"
                    owners[name] = index
            before = after
    assert set(owners.values()) == set(range(len(LAYOUT.units)))


PROVENANCE = {"transcripts": {"digest": "def"}, "dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": {"digest": "other", "name": "x"}}, "checkpoint digest abc, and this job has other"),
        ({"provenance": {"transcripts": {"digest": "new"}, "dtype": "float32"}}, "transcripts digest def"),
        ({"provenance": {"transcripts": {"digest": "def"}, "dtype": "bfloat16"}}, "dtype float32"),
        ({"provenance": PROVENANCE | {"tokenizer": {"digest": "new"}}}, "tokenizer digest"),
        ({"provenance": PROVENANCE | {"tokenizer": {"chat_template": "new"}}}, "chat template digest"),
        ({"spec": replace(SPEC, sinks=False)}, "spec"),
        ({"layout": plan_units(LENGTHS, 2048)}, "unit_tokens 1024"),
    ],
)
def test_resuming_another_job_is_refused_by_the_field_that_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_run(tmp_path / "r", units=[0])
    before = contents(tmp_path / "r")
    with pytest.raises(InputError, match=message):
        open_writer(tmp_path / "r", **(job(LAYOUT) | change))
    assert contents(tmp_path / "r") == before


def test_what_is_no_run_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    zarr.create_group(str(tmp_path / "zarr"), attributes={"a": 1})
    before = contents(tmp_path)
    for name, message in (
        ("file", "a file"),
        ("folder", "not a run"),
        ("zarr", "not a run"),
        ("ipfs2://b/r", "unknown scheme 'ipfs2'"),
    ):
        with pytest.raises(InputError, match=message):
            open_writer(name if "://" in name else tmp_path / name, **job(LAYOUT))
    assert contents(tmp_path) == before


def test_a_newer_schema_is_refused(run_path: Path) -> None:
    attributes = json.loads((run_path / "zarr.json").read_text())
    attributes["attributes"]["schema"] = SCHEMA + 1
    (run_path / "zarr.json").write_text(json.dumps(attributes))
    for opener in (open_run, lambda path: open_writer(path, **job(LAYOUT))):
        with pytest.raises(InputError, match="newer than this workbench"):
            opener(run_path)


@pytest.mark.parametrize(("name", "value"), [("gates", np.nan), ("sink", np.inf), ("logprob", np.nan)])
def test_what_is_not_finite_is_refused_with_layer_and_sequence(tmp_path: Path, name: str, value: float) -> None:
    with open_writer(tmp_path / "r", **job(LAYOUT)) as writer:
        tokens, records = unit_data(LAYOUT, LAYOUT.units[1])
        at = (7,) if name == "logprob" else (2, 7, 1)
        records[name][at] = value
        where = rf"{name} is not finite{'' if name == 'logprob' else ' in layer 2'}, sequence 's1' at position 7"
        with pytest.raises(JobError, match=where):
            writer.write_unit(1, tokens, records, {})
        assert 1 in writer.pending()


def test_a_bfloat16_nan_is_found_in_its_bits(tmp_path: Path) -> None:
    with open_writer(tmp_path / "r", **job(LAYOUT)) as writer:
        tokens, records = unit_data(LAYOUT, LAYOUT.units[0])
        records["activations/hook_resid_post"][1, 3, 0] = 0x7FC0
        with pytest.raises(JobError, match=r"hook_resid_post is not finite in layer 2, sequence 's0' at position 3"):
            writer.write_unit(0, tokens, records, {})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_unit_uncommitted_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "r"
    with open_writer(path, **job(LAYOUT)) as writer:

        def full(*rest: Any) -> None:
            raise OSError(number, reason)

        reason = "it is larger than the 7 bytes that it should have"
        monkeypatch.setattr(shards, "_put", full)
        if number == errno.EFBIG:  # a negative control: damage, not a limit of file sizes
            with pytest.raises(OSError, match="it is larger"):
                write_unit(writer, 0)
        reason = os.strerror(number)
        with pytest.raises(JobError, match="is full; free some space, then rerun the command"):
            write_unit(writer, 0)
        monkeypatch.undo()
        assert 0 in writer.pending()
    write_run(path)
    assert not verify(path)


def test_a_second_job_is_refused_with_the_first_s_host_process_and_time(tmp_path: Path) -> None:
    path = tmp_path / "r"
    refusal = rf"written by process {os.getpid()} on .* since 20"
    with open_writer(path, **job(LAYOUT)), pytest.raises(InputError, match=refusal):
        open_writer(path, **job(LAYOUT)).__enter__()
    with open_writer(path, **job(LAYOUT)):
        pass  # released


def test_a_dead_job_s_lock_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write_run(path, units=[])
    code = (
        "import sys; from workbench.runs.lock import Lock; from workbench.runs.storage import storage_at; "
        "Lock(storage_at(sys.argv[1])).acquire(); import os; os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert (tmp_path / f".r{LOCK}").exists()
    write_run(path)
    assert not (tmp_path / f".r{LOCK}").exists()


def test_a_kill_while_creating_leaves_something_the_next_start_replaces(tmp_path: Path) -> None:
    (tmp_path / ".r.1234.staging").mkdir()
    (tmp_path / ".r.1234.staging" / "zarr.json").write_text("{")
    write_run(tmp_path / "r")
    assert not verify(tmp_path / "r")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]


@pytest.mark.parametrize("name", ["with space", "ünï", "trailing/"])
def test_odd_paths_work(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    write_run(path)  # type: ignore[arg-type]
    assert len(open_run(path).sequences) == len(LENGTHS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_the_system_s_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_run(tmp_path / "r")


def test_finishing_early_is_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path / "r", **job(LAYOUT)) as writer:
        write_unit(writer, 0)
        with pytest.raises(RuntimeError, match="not committed"):
            writer.finish()


def test_a_spec_survives_json() -> None:
    spec = Spec(True, False, True, False, (Activation("attn.hook_z", (1, 4), 64),))
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert MODEL["n_layers"] == 3
