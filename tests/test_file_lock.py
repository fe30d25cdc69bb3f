"""One process at a time holds the lock of a file, under every name of the file, and leaves no file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.file_lock import FileLock, process_start

HOLD = "import sys; from workbench.file_lock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    code = HOLD + "print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match=f"is being written by process {holder.pid} on "):
            FileLock(target).acquire()
        holder.communicate()
    with FileLock(target):
        pass


def test_a_process_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, "-c", HOLD + "import os; os._exit(9)", target], check=False)
    assert (tmp_path / ".rows.jsonl.lock").exists()
    with FileLock(target):
        assert FileLock(target).path == tmp_path / ".rows.jsonl.lock"


def test_a_link_and_its_target_share_one_lock(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "rows.jsonl")
    with FileLock(tmp_path / "rows.jsonl"):
        with pytest.raises(InputError, match="is being written"):
            FileLock(tmp_path / "link").acquire()
        with FileLock(tmp_path / "other"):  # negative control: another file has another lock
            pass
    assert sorted(os.listdir(tmp_path)) == ["link", "rows.jsonl"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be locked"):
        FileLock(tmp_path / "file" / "rows.jsonl").acquire()


def test_a_reused_process_id_is_another_process() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None
