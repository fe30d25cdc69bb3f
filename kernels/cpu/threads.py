"""Threads for compiled loops that release Python's lock: the calling thread and helpers that wait for work.

A loop takes pieces of its work from a counter that its threads share, so that a thread whose core is busy elsewhere,
or slower, takes fewer. Handing a loop to a helper costs about 20 microseconds. A helper that has not begun when the
calling thread finds no piece left is not waited for: torch's own threads keep their cores for milliseconds after each
parallel operation.
"""

import ctypes
import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch

_Loop = Callable[..., None]
_Arguments = tuple[Any, ...]  # integers, and arrays of numpy


class _Job:
    """A loop for one helper, which runs it unless the caller has called it off before."""

    def __init__(self, loop: _Loop, arguments: _Arguments) -> None:
        self._loop, self._arguments = loop, arguments
        self._begun, self._finished = Lock(), Lock()
        self._finished.acquire()

    def run(self) -> None:
        """Run the loop, in a helper."""
        if self._begun.acquire(blocking=False):
            try:
                self._loop(*self._arguments)
            finally:
                self._finished.release()

    def end(self) -> None:
        """Return when the loop does not run and will not, in the calling thread."""
        if not self._begun.acquire(blocking=False):
            self._finished.acquire()


class _Helpers:
    """Threads that run a loop when they are given one. They end with the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._count = 0
        self._starting = Lock()

    def give(self, loop: _Loop, arguments: _Arguments, helpers: int) -> list[_Job]:
        """Let `helpers` threads run the loop; return a job for each."""
        with self._starting:
            for _ in range(self._count, helpers):
                Thread(target=self._serve, name="cpu-kernels", daemon=True).start()
                self._count += 1
        jobs = [_Job(loop, arguments) for _ in range(helpers)]
        for job in jobs:
            self._jobs.put(job)
        return jobs

    def _serve(self) -> None:
        while True:
            self._jobs.get().run()


_helpers = _Helpers()


def _forget_helpers() -> None:
    """A forked process has none of its parent's threads."""
    global _helpers  # noqa: PLW0603
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def run(loop: _Loop, pieces: int, *arguments: Any) -> None:
    """Run `loop(counter, *arguments)` on as many threads as torch may use, but no more than there are pieces."""
    counter = ctypes.c_int64(0)
    every = (ctypes.addressof(counter), *arguments)
    threads = min(torch.get_num_threads(), pieces)
    jobs = _helpers.give(loop, every, threads - 1) if threads > 1 else []
    try:
        loop(*every)
    finally:
        for job in jobs:
            job.end()
