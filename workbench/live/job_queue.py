"""A queue for one model and many viewers: one job at a time, in the order of arrival, at most one of each viewer.

A job is a generator. The worker takes one step after the other and ends a job that was cancelled, whose viewer has
left, or that takes longer than the limit. A viewer who starts another job replaces the one that waits or runs, and
goes to the end of the queue; so no viewer is served twice while another waits.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Generator
from enum import Enum

from workbench.errors import InputError

MAX_WAITING = 64


class State(Enum):
    """Where a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    TIMED_OUT = "stopped at the time limit"
    FAILED = "failed"


class Job:
    """The work of one viewer. state, seconds and reason may be read at any time."""

    def __init__(self, viewer: str, body: Generator[None, None, None]) -> None:
        self.viewer, self._body = viewer, body
        self.state, self.reason, self.steps = State.WAITING, "", 0
        self.seconds = 0.0
        self._cancelled = threading.Event()
        self.ended = threading.Event()

    def cancel(self) -> None:
        """End the job: at once if it waits, else after the present step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Return whether the job was asked to end."""
        return self._cancelled.is_set()

    def run(self, max_seconds: float) -> None:
        """Take all steps, unless the job is cancelled or takes longer than `max_seconds`."""
        begun = time.monotonic()
        try:
            self.state = State.CANCELLED if self.is_cancelled else State.RUNNING
            while self.state is State.RUNNING:
                try:
                    next(self._body)
                    self.steps += 1
                except StopIteration:
                    self.state = State.DONE
                    break
                self.seconds = time.monotonic() - begun
                if self.is_cancelled:
                    self.state = State.CANCELLED
                elif self.seconds > max_seconds:
                    self.state = State.TIMED_OUT
        except InputError as error:
            self.state, self.reason = State.FAILED, str(error)
        except Exception as error:
            traceback.print_exc()
            self.state, self.reason = State.FAILED, f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            self._body.close()
            self.ended.set()


class JobQueue:
    """Runs jobs in a thread of its own, until `close`."""

    def __init__(self, max_seconds: float = 120.0) -> None:
        self.max_seconds = max_seconds
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, viewer: str, body: Generator[None, None, None]) -> Job:
        """Add a job at the end of the queue; an earlier one of the same viewer is cancelled.

        Raises:
            InputError: too many jobs wait.
        """
        job = Job(viewer, body)
        with self._changed:
            self._cancel(viewer)
            if len(self._waiting) >= MAX_WAITING:
                raise InputError(f"{MAX_WAITING} requests are waiting already: try again later")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def leave(self, viewer: str) -> None:
        """Cancel what a viewer has in the queue."""
        with self._changed:
            self._cancel(viewer)

    def position(self, job: Job) -> int:
        """Return how many jobs come before this one, the running one included; 0 if it runs or has ended."""
        with self._changed:
            waiting = list(self._waiting)
            return waiting.index(job) + (self._running is not None) if job in waiting else 0

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join(timeout=60)

    def _cancel(self, viewer: str) -> None:
        for job in [job for job in self._waiting if job.viewer == viewer]:
            self._waiting.remove(job)
            job.cancel()
            job.run(self.max_seconds)  # takes no step, and reports that it was cancelled
        if self._running is not None and self._running.viewer == viewer:
            self._running.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = job = self._waiting.popleft()
            job.run(self.max_seconds)
