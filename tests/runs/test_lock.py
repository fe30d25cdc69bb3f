"""A lock admits exactly one of several processes that start together, however its last holder ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.runs.lock import FileLock


def compete(kind: str, root: Path | str, processes: int, trials: int) -> dict[str, int]:
    """Trials by the number of processes that each admitted."""
    command = [sys.executable, "-m", "tests.runs.locking", kind, str(root), str(processes), str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("kind", ["start", "dead"])
def test_every_trial_admits_exactly_one(tmp_path: Path, kind: str, processes: int, long: bool) -> None:
    trials = 1000 if long else 25
    assert compete(kind, tmp_path, processes, trials) == {"1": trials}


def test_a_lock_that_is_taken_and_released_is_held_by_one_at_a_time(tmp_path: Path, long: bool) -> None:
    rounds = 1000 if long else 20
    assert compete("spin", tmp_path, 4, rounds) == {"rounds": 4 * rounds}


def test_the_trials_find_a_lock_that_looks_before_it_writes(tmp_path: Path) -> None:
    result = compete("broken", tmp_path, 4, 10)
    assert result.get("1", 0) < 10


def test_nothing_is_left_after_a_release_and_another_object_does_not_release(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "run"), FileLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(InputError, match="is being written by process"):
        second.acquire()
    second.release()
    assert first.path.exists()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_to_a_run_has_the_run_s_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "other name").symlink_to(tmp_path / "run")
    with FileLock(tmp_path / "run"), pytest.raises(InputError, match="is being written"):
        FileLock(tmp_path / "other name").acquire()


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".run.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="cannot be locked"):
        FileLock(tmp_path / "run").acquire()
    assert (tmp_path / "mine").read_text() == "precious"
