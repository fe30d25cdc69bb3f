"""Workers on this machine: stopped while they start, unable to start, and interrupted beside the command."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest

from workbench.capture.local_workers import local_workers
from workbench.child_processes import isolated_children
from workbench.errors import JobError


@contextmanager
def unprotected_workers(check: Callable[[], None]) -> Iterator[Any]:
    """Start two workers in the thread of the caller, as Dask does: the broken implementation."""
    with (
        isolated_children(),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        check()
        yield client


def two_workers(check: Callable[[], None]) -> Any:
    return local_workers(2, resources={}, check=check)


def started() -> list[Any]:
    """The processes of workers that this process has started, whether they are ready or not."""
    return [p for p in multiprocessing.active_children() if p.name.startswith("Dask Worker")]


class Stopped:
    """A check that asks to stop as soon as a worker's process is there, and notes how many workers are ready then."""

    def __init__(self) -> None:
        self.ready: int | None = None

    def __call__(self) -> None:
        if started():
            clusters = distributed.LocalCluster._instances
            self.ready = sum(len(cluster.scheduler_info["workers"]) for cluster in clusters)
            raise JobError("stopped by SIGINT")


@pytest.fixture
def never_ready(tmp_path: Path) -> Iterator[None]:
    """Workers that load a module which takes an hour, so that what happens in a test happens before they are ready."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(3600)\n")
    with dask.config.set({"distributed.worker.preload": [str(tmp_path / "slow.py")]}):
        yield


@pytest.mark.usefixtures("never_ready")
def test_a_stop_while_workers_start_is_the_only_error(capfd: pytest.CaptureFixture[str]) -> None:
    check = Stopped()
    with pytest.raises(JobError, match=r"^stopped by SIGINT$"), two_workers(check):
        pytest.fail("the workers were waited for")
    assert check.ready == 0
    assert started() == []
    assert capfd.readouterr().err == ""


def killing() -> None:
    """Kill workers that start, as a system without memory does."""
    for process in started():
        process.kill()


@pytest.mark.usefixtures("never_ready")
def test_a_worker_that_is_killed_while_it_starts_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(JobError, match=r"^2 workers could not be started .*: check its free memory"),
        two_workers(killing),
    ):
        pytest.fail("the workers started")
    assert started() == []
    assert capfd.readouterr().err == ""


def test_the_reason_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(distributed.Scheduler, "listen", refused)
    reason = r"^2 workers could not be started .*\(PermissionError: \[Errno 13\] Permission denied\)"
    with pytest.raises(JobError, match=reason), two_workers(lambda: None):
        pytest.fail("the scheduler started")


def blocks_ctrl_c() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def waiting_ctrl_c() -> bool:
    return signal.SIGINT in signal.sigpending()


def test_ctrl_c_reaches_the_workers_through_the_command_only() -> None:
    with two_workers(lambda: None) as client:
        workers = list(client.run(os.getpid).values())
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        assert list(client.run(waiting_ctrl_c).values()) == [True, True]
        assert list(client.run(os.getpid).values()) == workers
        assert client.submit(sum, [1, 2]).result() == 3
    assert not blocks_ctrl_c()  # in this process


def test_workers_as_dask_starts_them_are_interrupted() -> None:
    """The negative control."""
    with unprotected_workers(lambda: None) as client:
        assert list(client.run(blocks_ctrl_c).values()) == [False, False]


def test_without_a_thread_of_its_own_a_start_cannot_be_stopped() -> None:
    """The negative control: the job is asked to stop when its workers have started."""
    with pytest.raises(JobError, match="stopped by SIGINT"), unprotected_workers(check := Stopped()):
        pytest.fail("the job was not stopped")
    assert check.ready == 2
