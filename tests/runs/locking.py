"""Processes that compete for locks: `python -m tests.runs.locking KIND ROOT PROCESSES TRIALS`.

KIND: "start" takes a new lock, "dead" takes one whose holder was killed, "mixed" does both in turn, "spin" takes and
releases one lock as fast as possible, "broken" is the negative control. ROOT is a folder or the URL of an object
store. The same processes make all trials, as opening an object store takes a moment. Prints how many trials admitted
how many processes at the same time.
"""

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from workbench.errors import InputError
from workbench.runs.lock import LOCK, FileLock, Lock
from workbench.runs.storage import Storage, storage_at

LONGEST_S = 120.0  # of a trial: another process ended, and nobody may wait for it
REFUSED, ADMITTED, BADLY_REFUSED = range(3)


class CheckThenWrite:
    """The negative control: two processes may both find no lock."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def acquire(self) -> None:
        if self._storage.exists(LOCK):
            raise InputError("held")
        time.sleep(0.02)  # long enough for another process to look, on a busy machine too
        self._storage.put(LOCK, [b"mine"])

    def release(self) -> None:
        """Leave the lock, as no other trial has its path."""


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


def compete(number: int, kind: str, root: str, trials: int, barrier: Any, begin: Any, outcomes: Any) -> Counter[int]:
    """Make all trials as one of the processes; return how many trials admitted how many, for the first of them."""
    admitted: Counter[int] = Counter()
    for trial in range(trials):
        path = f"{root}/{kind}-{len(outcomes)}-{trial}"
        if number == 0:
            if kind == "dead" or (kind == "mixed" and trial % 2):
                leave_dead(path)
            begin.value = time.time() + 0.001 * len(outcomes)
        lock = CheckThenWrite(storage_at(path)) if kind == "broken" else Lock(storage_at(path))
        barrier.wait(LONGEST_S)
        while time.time() < begin.value:
            pass
        outcomes[number] = attempt(lock)
        barrier.wait(LONGEST_S)  # the holder holds until everybody has tried
        if number == 0:
            assert BADLY_REFUSED not in list(outcomes)
            admitted[list(outcomes).count(ADMITTED)] += 1
        if outcomes[number] == ADMITTED:
            lock.release()
    return admitted


def attempt(lock: Lock | CheckThenWrite) -> int:
    """How one process fares."""
    try:
        lock.acquire()
    except InputError as error:
        return BADLY_REFUSED if "\n" in str(error) else REFUSED
    return ADMITTED


def spin(path: str, wanted: int) -> int:
    """Take the lock this many times; another holder at the same time is found by the marker."""
    inside, rounds = f"{path}.inside", 0
    while rounds < wanted:
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


def results(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each job returns, which runs in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(number: int) -> None:
        queue.put((number, jobs[number]()))

    children = [context.Process(target=run, args=(number,)) for number in range(len(jobs))]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise SystemExit("a process failed")
    return [result for _, result in sorted(queue.get() for _ in jobs)]


def main(kind: str, root: str, processes: int, trials: int) -> None:
    if kind == "spin":
        print(json.dumps({"rounds": sum(results([lambda: spin(f"{root}/spin", trials)] * processes))}))
        return
    context = multiprocessing.get_context("fork")
    shared = context.Barrier(processes), context.Value("d", 0.0), context.Array("i", processes)

    def job(number: int) -> Callable[[], dict[int, int]]:
        return lambda: dict(compete(number, kind, root, trials, *shared))

    admitted = results([job(number) for number in range(processes)])[0]
    print(json.dumps({str(k): v for k, v in sorted(admitted.items())}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
