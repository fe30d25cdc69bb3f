"""One process at a time holds the lock of a file, under every name of the file, and leaves no file."""

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workbench import file_lock
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


class Signalled:
    """Send Ctrl-C before or after the n-th call of the system; `done` counts them."""

    CALLS = ((os, "open"), (os, "ftruncate"), (os, "pwrite"), (os, "unlink"), (os, "close"), (fcntl, "flock"))

    def __init__(self, patch: pytest.MonkeyPatch, at: int, moment: str) -> None:
        self.done, self._at, self._moment = 0, at, moment
        for module, name in self.CALLS:
            patch.setattr(module, name, partial(self._call, getattr(module, name)))

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        here = self.done == self._at
        self.done += 1
        if here and self._moment == "before":
            signal.raise_signal(signal.SIGINT)
        result = function(*arguments, **options)
        if here and self._moment == "after":
            signal.raise_signal(signal.SIGINT)
        return result


def left_by_interruptions(folder: Path, moment: str) -> list[list[str]]:
    """Return the files that are left after Ctrl-C at every call of the system while a lock is taken and released."""
    before, left = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        for at in itertools.count():
            (folder / str(at)).mkdir()
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                signalled = Signalled(patch, at, moment)
                with FileLock(folder / str(at) / "rows.jsonl"):
                    pass
            left.append(os.listdir(folder / str(at)))
            if signalled.done <= at:
                return left
    finally:
        signal.signal(signal.SIGINT, before)
    raise AssertionError


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_at_any_call_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "right").mkdir()
    left = left_by_interruptions(tmp_path / "right", moment)
    assert len(left) > 5
    assert not any(left)
    with FileLock(tmp_path / "right" / "0" / "rows.jsonl"):
        pass
    (tmp_path / "wrong").mkdir()
    monkeypatch.setattr(file_lock, "interruptions_wait", contextlib.nullcontext)
    assert any(left_by_interruptions(tmp_path / "wrong", moment)), "the negative control lets them interrupt"


@pytest.mark.parametrize("lacks", [True, False])
def test_a_system_without_flock_is_named(lacks: bool) -> None:
    code = f"import sys; {lacks} and sys.modules.update(fcntl=None); import workbench.file_lock"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ("run the workbench in WSL" in (done.stderr.strip().splitlines() or [""])[-1]) is lacks
    assert (done.returncode == 0) is not lacks
