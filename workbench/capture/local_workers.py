"""Dask workers on this machine, which an interruption reaches through the process that started them only.

Dask starts workers within a call that cannot be stopped, and lets a worker that was interrupted while it started print
its traceback. Here the call runs in a thread of its own, while the caller's thread looks whether it is asked to stop;
Ctrl-C in a terminal, which is sent to every process of the command, is blocked in the workers.
"""

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import Any

from workbench.child_processes import isolated_children
from workbench.counting import count_of
from workbench.errors import InputError, JobError

_POLL_S = 0.05
_WORKER_PROCESS = "Dask Worker process"  # how the name of such a process begins


@contextmanager
def local_workers(count: int, *, resources: Mapping[str, int], check: Callable[[], None]) -> Iterator[Any]:
    """Start this many workers and yield a client of theirs; the workers end with the block.

    resources: of each worker, as {"GPU": 1}. check: raises an error if the job has been asked to stop; it is called
    again and again while workers start, and what it raises ends those that have begun.

    Raises:
        InputError: cryptography is not installed.
        JobError: a worker or the scheduler could not start.
    """
    from distributed import Client
    from distributed.security import Security

    try:
        # TLS with a certificate of this job: other users of the machine reach the port, but are not admitted
        security = Security.temporary()
    except ImportError as error:
        if find_spec("cryptography"):  # it is installed and cannot be loaded, as without memory
            raise
        raise InputError("several workers need cryptography: pip install 'gpt-oss-workbench[cluster]'") from error
    with isolated_children(), ThreadPoolExecutor(1) as executor:
        before = {process.pid for process in multiprocessing.active_children()}
        resource_tracker.ensure_running()  # its start would unblock signals in the thread that starts it
        starting = executor.submit(_start, count, dict(resources), security)
        try:
            cluster = _wait_for(starting, count, check)
            with Client(cluster) as client:
                yield client
        finally:
            _end(starting, before)


def _start(count: int, resources: dict[str, int], security: Any) -> Any:
    """Return a cluster whose processes have SIGINT blocked, as every thread and process that this thread starts."""
    from distributed import LocalCluster

    if hasattr(signal, "pthread_sigmask"):  # Windows has none: workers that Ctrl-C reaches there end by themselves
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    with isolated_children():
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            resources=resources,
            dashboard_address=None,
            memory_limit=None,
            silence_logs=logging.CRITICAL,  # what fails is raised; the rest is the noise of an end in a hurry
            security=security,
            protocol="tls",
            host="127.0.0.1",
        )


def _wait_for(starting: "Future[Any]", count: int, check: Callable[[], None]) -> Any:
    """Return the cluster when its workers have started.

    Raises:
        JobError: they could not start.
    """
    while not starting.done():
        check()
        time.sleep(_POLL_S)
    check()  # a signal to every process of the job also ends workers that start
    try:
        return starting.result()
    except (RuntimeError, OSError, MemoryError) as error:
        raise JobError(
            f"{count_of(count, 'worker')} could not be started on this machine ({_reason(error)}): check its free "
            "memory and the limits of processes and open files (`ulimit -a`), or use fewer --workers; rerun "
            "the command to resume"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the error of the system, or the first error, that led to an error, with its type."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    of_system = (cause for cause in chain if isinstance(cause, OSError | MemoryError))
    cause = next(of_system, chain[-1])
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__


def _end(starting: "Future[Any]", before: set[int | None]) -> None:
    """End the workers, those that have not finished starting too. before: child processes that are not theirs."""
    while not starting.done():
        for process in multiprocessing.active_children():
            if process.pid not in before and process.name.startswith(_WORKER_PROCESS):
                process.kill()
        time.sleep(_POLL_S)
    with suppress(RuntimeError, OSError, MemoryError):  # what failed to start has ended, and its error was raised
        starting.result().close()
