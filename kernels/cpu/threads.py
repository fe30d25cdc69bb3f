"""Threads for compiled loops that release Python's lock: the calling thread and helpers that wait for work.

A loop takes pieces of its work from a counter that its threads share, so that a thread whose core is busy elsewhere,
or slower, takes fewer. Handing a loop to a helper costs about 20 microseconds.
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


class _Helpers:
    """Threads that run a loop when they are given one. They end with the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[_Loop, _Arguments, Lock]] = SimpleQueue()
        self._count = 0
        self._starting = Lock()

    def give(self, loop: _Loop, arguments: _Arguments, helpers: int) -> list[Lock]:
        """Let `helpers` threads run the loop; return a lock for each, which it releases when it has finished."""
        with self._starting:
            for _ in range(self._count, helpers):
                Thread(target=self._serve, name="cpu-kernels", daemon=True).start()
                self._count += 1
        finished = [Lock() for _ in range(helpers)]
        for lock in finished:
            lock.acquire()
            self._jobs.put((loop, arguments, lock))
        return finished

    def _serve(self) -> None:
        while True:
            loop, arguments, finished = self._jobs.get()
            try:
                loop(*arguments)
            finally:
                finished.release()


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
    waiting = _helpers.give(loop, every, threads - 1) if threads > 1 else []
    loop(*every)
    for finished in waiting:
        finished.acquire()
