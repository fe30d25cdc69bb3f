"""Handle SIGINT and SIGTERM during a job: finish the writes in progress, and drop the computation in progress."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from workbench.errors import JobError


@contextmanager
def interruptions_wait() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM wait until the block has ended, which must be a matter of milliseconds."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # raises those that came before
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # raises those that came meanwhile


class StopSignal:
    """Between `with` and its end the first signal asks the job to stop; a second one stops it at once.

    asked: the name of the signal, "" before there was one.
    """

    def __init__(self, job: str) -> None:
        self._job, self.asked = job, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def check(self) -> None:
        """Stop here if somebody asked for it."""
        if self.asked:
            raise JobError(
                f"{self._job} was stopped by {self.asked}; what was written is saved: rerun the command to resume"
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._give_back()
        print(f"{self.asked}: finishing what is being written; once more stops at once", file=sys.stderr, flush=True)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
