"""Viewers are served in the order of arrival, none twice while another waits; jobs end when they should."""

import threading
import time
from collections.abc import Generator, Iterator

import pytest

from workbench.errors import InputError
from workbench.live.job_queue import MAX_WAITING, JobQueue, State


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    made = JobQueue(max_seconds=60)
    yield made
    made.close()


class Work:
    """Bodies of jobs that note when they run, and that a gate holds up."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.closed: list[str] = []
        self.gate = threading.Event()

    def body(self, name: str, steps: int = 3) -> Generator[None, None, None]:
        try:
            for _ in range(steps):
                self.gate.wait(300)
                self.order.append(name)
                yield
        finally:
            self.closed.append(name)


def test_five_viewers_are_served_in_turn(queue: JobQueue) -> None:
    work = Work()
    viewers = ["a", "b", "c", "d", "e"]
    jobs = {name: queue.submit(name, work.body(name)) for name in viewers}
    while jobs["a"].state is not State.RUNNING:
        time.sleep(0.01)
    assert [queue.position(jobs[name]) for name in viewers] == [0, 1, 2, 3, 4]
    for _ in range(5):  # an impatient viewer who asks again and again
        jobs["b"] = queue.submit("b", work.body("b"))
    assert [queue.position(jobs[name]) for name in ("c", "d", "e", "b")] == [1, 2, 3, 4]
    work.gate.set()
    for job in jobs.values():
        assert job.ended.wait(300)
    assert work.order == ["a"] * 3 + ["c"] * 3 + ["d"] * 3 + ["e"] * 3 + ["b"] * 3
    assert all(job.state is State.DONE and queue.position(job) == 0 for job in jobs.values())


def test_a_queue_that_serves_the_newest_first_would_be_seen(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control of the test above."""
    work = Work()
    jobs = [queue.submit(name, work.body(name, 1)) for name in "a"]
    while jobs[0].state is not State.RUNNING:
        time.sleep(0.01)
    jobs += [queue.submit(name, work.body(name, 1)) for name in "bcd"]
    queue._waiting.reverse()
    work.gate.set()
    assert all(job.ended.wait(300) for job in jobs)
    assert work.order == ["a", "d", "c", "b"]


def test_a_viewer_who_leaves_frees_the_model(queue: JobQueue) -> None:
    work = Work()
    endless, waiting = queue.submit("a", work.body("a", 10**9)), queue.submit("b", work.body("b"))
    last = queue.submit("c", work.body("c"))
    work.gate.set()
    while not work.order:
        time.sleep(0.01)
    queue.leave("b")
    assert waiting.state is State.CANCELLED
    queue.leave("a")
    assert last.ended.wait(300)
    assert (endless.state, last.state) == (State.CANCELLED, State.DONE)
    assert "b" not in work.order
    assert "a" in work.closed, "the body was closed, so that hooks are off the model"


def test_time_limit_and_errors_end_one_job_only(capsys: pytest.CaptureFixture[str]) -> None:
    queue, work = JobQueue(max_seconds=0.05), Work()
    work.gate.set()

    def without_end() -> Generator[None, None, None]:
        try:
            while True:
                yield
        finally:
            queue.max_seconds = 600  # on a busy machine, the others may take longer than this one may

    def wrong(error: Exception) -> Generator[None, None, None]:
        yield
        raise error

    endless = queue.submit("a", without_end())
    refused = queue.submit("b", wrong(InputError("layer 9: expected 0 to 3")))
    broken = queue.submit("c", wrong(ZeroDivisionError("x")))
    last = queue.submit("d", work.body("d", 1))
    assert last.ended.wait(300)
    assert (endless.state, refused.state, broken.state, last.state) == (
        State.TIMED_OUT,
        State.FAILED,
        State.FAILED,
        State.DONE,
    )
    assert (refused.reason, broken.reason) == ("layer 9: expected 0 to 3", "ZeroDivisionError: x")
    assert "ZeroDivisionError" in capsys.readouterr().err, "an error of ours is printed"
    queue.close()


def test_a_full_queue_refuses(queue: JobQueue) -> None:
    work = Work()
    first = queue.submit("first", work.body("first"))
    while first.state is not State.RUNNING:
        time.sleep(0.01)
    jobs = [queue.submit(str(i), work.body(str(i), 1)) for i in range(MAX_WAITING)]
    with pytest.raises(InputError, match="try again later"):
        queue.submit("another", work.body("another"))
    for job in jobs:
        job.cancel()
    work.gate.set()
    assert all(job.ended.wait(300) for job in jobs)
    assert {job.state for job in jobs} == {State.CANCELLED}
    assert set(work.order) == {"first"}
