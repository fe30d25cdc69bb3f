"""Processes that compete for locks: `python -m tests.runs.locking KIND ROOT PROCESSES TRIALS`.

KIND: "start" takes a new lock, "dead" takes one whose holder was killed, "spin" takes and releases one lock as fast as
possible, "broken" is the negative control. Prints how many processes each trial admitted at the same time, summed up.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from workbench.errors import InputError
from workbench.runs.lock import LOCK, FileLock, Lock
from workbench.runs.storage import storage_at


class CheckThenWrite:
    """The negative control: two processes may both find no file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).with_name(f"{Path(path).name}{LOCK}")

    def acquire(self) -> None:
        if self.path.exists():
            raise InputError("held")
        time.sleep(0.002)
        self.path.write_text("mine")

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


def leave_dead(path: str) -> None:
    """A lock as a killed process leaves it."""
    target = storage_at(path)
    dead = json.dumps(
        {"host": os.uname().nodename, "process": 2**22 + 1, "process_start": "1", "nonce": "dead"}
    ).encode()
    if "://" in path:
        assert target.create(LOCK, dead)
    else:
        FileLock(path).path.write_bytes(dead)


def attempt(kind: str, path: str, wait_until: float) -> str:
    """One process of a trial: whether it was admitted. It holds the lock until the end of the trial."""
    lock = CheckThenWrite(path) if kind == "broken" else Lock(storage_at(path))
    time.sleep(max(0.0, wait_until - time.time() - 0.002))
    while time.time() < wait_until:
        pass
    try:
        lock.acquire()
    except InputError as error:
        return "refused" if "\n" not in str(error) else "badly refused"
    return "admitted"


def spin(path: str, seconds: float) -> int:
    """Take the lock again and again; another holder at the same time is found by the marker."""
    inside, rounds, end = f"{path}.inside", 0, time.time() + seconds
    while time.time() < end:
        lock = Lock(storage_at(path))
        try:
            lock.acquire()
        except InputError:
            continue
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        os.unlink(inside)
        lock.release()
        rounds += 1
    return rounds


def main(kind: str, root: str, processes: int, trials: int) -> None:
    admitted: Counter[int] = Counter()
    if kind == "spin":
        print(
            json.dumps({"rounds": sum(map(int, _run([lambda: str(spin(f"{root}/spin", trials / 100))] * processes)))})
        )
        return
    for trial in range(trials):
        path = f"{root}/{kind}-{processes}-{trial}"
        if kind == "dead":
            leave_dead(path)
        # the start is far enough away for all children to be there
        begin = time.time() + 0.004 * processes + (0.25 if "://" in path else 0)
        results = _run([partial(attempt, kind, path, begin)] * processes)
        assert set(results) <= {"admitted", "refused"}, results
        admitted[results.count("admitted")] += 1
    print(json.dumps({str(k): v for k, v in sorted(admitted.items())}))


def _run(jobs: list[Callable[[], str]]) -> list[str]:
    """Results of a process each. They are killed when all have a result, so a holder holds until everybody has tried."""
    children = [_child(job) for job in jobs]
    results = [os.read(read, 100).decode() for _, read in children]
    for pid, read in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
    return results


def _child(job: Callable[[], str]) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, job().encode())
            os.close(write)
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    return pid, read


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
