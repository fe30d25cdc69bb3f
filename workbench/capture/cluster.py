"""Compute units as Dask tasks: by workers on this machine (`--workers`), or by a scheduler (`--dask ADDRESS`).

A task is a unit's number. A worker loads the model once, computes the unit and writes it. Units share no file, so
workers do not depend on each other: if one dies, the scheduler gives its unit to another. The process that started
the job has no weights; it holds the lock of the run and is the only one to finish it.
"""

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.capture import pipeline
from workbench.capture.job_plan import JobPlan, job_writer, plan_job
from workbench.capture.local_workers import local_workers
from workbench.capture.recorder import Recorder, for_workers
from workbench.errors import InputError, JobError
from workbench.model import load
from workbench.model.transformer import GptOss
from workbench.runs.writer import RunWriter

RETRIES = 3  # of a unit that fails
_LOST_WORKERS = 20  # that one unit may take with it before it is given up
_POLL_S = 0.5


@dataclass(frozen=True)
class Task:
    """What a worker needs to compute any unit of a job, as plain values that can be sent to it."""

    checkpoint: str
    adapter: str | None
    dtype: str
    device: str
    threads: int
    transcripts: str
    run: str
    record: tuple[str | Recorder, ...]
    unit_tokens: int
    exclude: str | None = None
    routing: str = "own"
    ignore_fields: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: GptOss,
        transcripts: str | Path,
        run: str | Path,
        record: Sequence[str | Recorder],
        unit_tokens: int,
        threads: int,
        device: str | None = None,
        exclude: str | None = None,
        routing: str = "own",
    ) -> "Task":
        """Return the task for a model, which workers load from its folder.

        threads: of each worker. device: where workers load it; the device type of `model` if None.
        """
        return cls(
            checkpoint=str(Path(model.checkpoint.path).absolute()),
            adapter=None if model.adapter is None else str(Path(model.adapter.path).absolute()),
            dtype=str(model.dtype).removeprefix("torch."),
            device=device or model.device.type,
            threads=threads,
            transcripts=str(Path(transcripts).absolute()),
            run=str(run) if "://" in str(run) else str(Path(run).absolute()),
            record=tuple(map(for_workers, record)),
            unit_tokens=unit_tokens,
            exclude=exclude,
            routing=routing,
            ignore_fields=model.checkpoint.ignore_fields,
        )


def run(
    task: Task,
    units: Sequence[int],
    *,
    workers: int,
    address: str | None,
    check: Callable[[], None],
    done: Any,
) -> None:
    """Compute these units with `workers` processes of this machine, or by the scheduler at `address`.

    Raises:
        InputError: there is no worker, dask is not installed, or other processes cannot see the run.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    try:
        import distributed
    except ImportError as error:
        raise InputError("several workers need dask's scheduler: pip install 'gpt-oss-workbench[cluster]'") from error

    if task.run.startswith("memory://"):
        raise InputError(
            f"{task.run} is in the memory of one process: several workers need a local folder or object storage"
        )
    with _client(task, workers, address, check) as client:
        known = client.scheduler_info()["workers"].values()
        gpus = {"GPU": 1} if any("GPU" in worker["resources"] for worker in known) else None
        futures = client.map(
            functools.partial(attempt_unit, task),
            list(units),
            retries=RETRIES,
            resources=gpus,
            pure=False,
            batch_size=256,
        )
        left = set(futures)
        try:
            while left:
                check()
                finished = {future for future in left if future.done()}
                left -= finished
                for future in finished:
                    result = future.result()
                    if isinstance(result, InputError):
                        raise result
                    done.committed(*result)
                if not finished:
                    if client.status != "running":
                        raise JobError(
                            f"the scheduler at {address} is gone; what was written is saved: "
                            "rerun the command to resume"
                        )
                    time.sleep(_POLL_S)
        except (distributed.CancelledError, distributed.comm.CommClosedError) as error:
            raise JobError(
                f"the scheduler at {address} is gone; what was written is saved: rerun the command to resume"
            ) from error
        except distributed.KilledWorker as error:
            raise JobError(
                f"{_LOST_WORKERS} workers died at one unit ({error.last_worker.address} the last): see their logs; "
                "what was written is saved: rerun the command to resume"
            ) from error
        finally:
            client.cancel([future for future in left if not future.done()])


@contextmanager
def _client(task: Task, workers: int, address: str | None, check: Callable[[], None]) -> Iterator[Any]:
    """Connect to the scheduler at `address`, or start one with this many workers on this machine."""
    import dask
    from distributed import Client

    settings = {"distributed.scheduler.allowed-failures": _LOST_WORKERS, "distributed.worker.daemon": False}
    with dask.config.set(settings):
        if address is not None:
            try:
                client = Client(address, timeout=10)
            except (OSError, TimeoutError, ValueError) as error:
                raise InputError(f"--dask {address}: no scheduler answers there ({type(error).__name__})") from error
            with client:
                yield client
            return
        gpu = {"GPU": 1} if task.device == "cuda" else {}
        with local_workers(workers, resources=gpu, check=check) as client:
            yield client


def attempt_unit(task: Task, index: int) -> tuple[int, int, int, float] | InputError:
    """Compute a unit, or return what is refused: another attempt would be refused too."""
    try:
        return compute_unit(task, index)
    except InputError as error:
        return error


def compute_unit(task: Task, index: int) -> tuple[int, int, int, float]:
    """Compute and write one unit: its number, tokens, bytes before compression, and seconds."""
    begun = time.monotonic()
    tokens = size = 0

    def done(computed: Any, seconds: float) -> None:
        nonlocal tokens, size
        tokens = len(computed.tokens["id"])
        size = sum(v.nbytes for v in (*computed.tokens.values(), *computed.records.values()))

    model, job, writer = _loaded(task)
    pipeline.run(model, job.rows, job.spec, writer, [index], check=lambda: None, done=done, in_flight=1)
    return index, tokens, size, time.monotonic() - begun


@functools.lru_cache(maxsize=1)
def _loaded(task: Task) -> tuple[GptOss, JobPlan, RunWriter]:
    """Return the model, plan and writer of a job; loaded once in each worker.

    Raises:
        InputError: this worker cannot reach a file of the job, or its file differs.
    """
    try:
        return _load(task)
    except InputError as error:
        raise InputError(f"worker {os.getpid()} on {platform.node()}: {error}") from error


def _load(task: Task) -> tuple[GptOss, JobPlan, RunWriter]:
    torch.set_num_threads(task.threads)
    model = load(
        task.checkpoint,
        device=_device(task),
        dtype=getattr(torch, task.dtype),
        adapter=task.adapter,
        ignore_fields=task.ignore_fields,
    )
    plan = plan_job(
        model,
        task.transcripts,
        record=task.record,
        unit_tokens=task.unit_tokens,
        exclude=task.exclude,
        routing=task.routing,
    )
    return model, plan, job_writer(plan, model, task.transcripts, task.run)


def worker_device(name: str) -> str:
    """Return the device type on which workers load the model: "auto" is a GPU where this machine has one.

    Raises:
        InputError: the name has an index or several devices, which workers choose themselves.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not name.isalpha():
        raise InputError(f"device {name!r}: several workers choose their own GPUs; use device='auto', 'cuda' or 'cpu'")
    return name


def _device(task: Task) -> str:
    """Return the device of this worker: workers of one machine take its GPUs in turn, by their number."""
    if task.device != "cuda" or torch.cuda.device_count() < 2:
        return task.device
    from distributed import get_worker

    name = str(get_worker().name)
    number = int(name) if name.isdigit() else os.getpid()
    return f"cuda:{number % torch.cuda.device_count()}"
