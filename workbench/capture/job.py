"""The capture job: transcripts through the model, unit by unit, into a run.

Every sequence's length is known before the first forward pass, so the run is laid out first; then each
unit is computed, written and committed, here or by workers. Starting the same job again goes on where the last one
stopped: a unit's content depends on the unit alone, and not on the process that computes it.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from workbench.capture import cluster, estimate, pipeline, recording
from workbench.capture.job_log import CommittedUnits, log_path, logged
from workbench.capture.job_plan import JobPlan, job_writer, plan_job
from workbench.capture.shape_model import ShapeModel
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.flags import counted
from workbench.model.transformer import GptOss
from workbench.notebook import notebook_display
from workbench.outputs import check_kind, refuse_inputs
from workbench.progress import progress
from workbench.runs import Run, open_run
from workbench.signals import StopSignal

log = logging.getLogger("workbench.capture")


def capture(
    model: GptOss,
    transcripts: str | Path,
    path: str | Path,
    *,
    record: Sequence[recording.RecordOption] = recording.DEFAULT,
    unit_tokens: int = 16_384,
    strict: bool = False,
    exclude: str | None = None,
    routing: str = "own",
    workers: int = 1,
    dask: str | None = None,
    log_file: str | Path | None = None,
    worker_device: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Run `transcripts` through `model` and record into the run at `path`, made or resumed.

    record: see `workbench.capture.recording`. Transcript rows that cannot be used are skipped and listed in the run's
    rejects; with `strict` they are refused before anything is written. exclude: flags of sequences to leave out, as in
    "irregular,truncated"; see `workbench.harmony.flags`. routing: "host" forces the experts that a host chose, see
    `workbench.capture.host_routing`. workers, or the address of a Dask scheduler: see
    `workbench.capture.cluster`. Workers load the model themselves: with `wb.load(…, device="meta")` this process holds
    no weights beside theirs. worker_device: where they load it; the device type of `model` if None, and for "meta" a
    GPU where there is one. What happens is logged to `log_file`, beside a local run if None. overwrite: replace a run
    that is there instead of resuming it.

    Raises:
        InputError: an option, the transcripts or the run is refused; nothing was written.
        JobError: a signal, a full disk or the loss of workers stopped the job; what was written is kept.
    """
    inputs = [transcripts, model.checkpoint.path]
    _check_run_path(path, inputs, overwrite=overwrite)
    log_to = log_path(path, log_file, inputs)
    shared = workers > 1 or dask is not None
    worker_device = _worker_device(model, worker_device) if shared else None
    if model.device.type == "meta" and not shared:
        raise InputError(
            "the model is on the device 'meta' and has no weights: load it on another device, or use workers=2 or "
            "more, which load the weights themselves"
        )
    job = plan_job(
        model, transcripts, record=record, unit_tokens=unit_tokens, strict=strict, exclude=exclude, routing=routing
    )
    _refuse_full_disk(model, job, _pending(job, None if overwrite else path), path)
    with (
        job_writer(job, model, transcripts, path, device=worker_device, overwrite=overwrite) as writer,
        logged(log_to),
        StopSignal(str(path)) as interrupt,
    ):
        pending = writer.pending()
        tokens = _announce(model, job, pending, path)
        with progress("capture", tokens, "tokens") as advance:
            done = CommittedUnits(advance, len(job.layout.units))
            with done.failure_logged(path, len(pending)):
                if shared:
                    _refuse_pipe(transcripts)
                    threads = max(1, torch.get_num_threads() // workers)
                    task = cluster.Task.of(
                        model, transcripts, path, record, unit_tokens, threads, worker_device, exclude, routing
                    )
                    check = interrupt.check
                    cluster.run(task, pending, workers=workers, address=dask, check=check, done=done)
                else:
                    pipeline.run(model, job.rows, job.spec, writer, pending, check=interrupt.check, done=done.unit)
        writer.finish()
        written = open_run(path)
        _ = written.sequences  # a damaged table is refused here, where it leaves no log
        log.info("%s: complete", path)
    return written


def _announce(model: GptOss, job: JobPlan, pending: Sequence[int], path: str | Path) -> int:
    """Log and print what is computed and how large it is; return the tokens of the pending units."""
    n = sum(len(job.rows[s].tokens) for u in pending for s in job.layout.units[u].sequences)
    sizes = recording.bytes_per_token(job.spec, model.cfg)
    listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    begins = (
        f"{len(pending):,} of {count_of(len(job.layout.units), 'unit')} to go, {count_of(n, 'token')}, "
        f"each {sum(sizes.values()):,} bytes"
    )
    log.info("%s: %s before compression: %s", path, begins, listed)
    plain = sys.stdout if notebook_display() else sys.stderr  # a notebook shows standard error as if it were an error
    print(f"capture: {begins} before compression ({listed})", file=plain, flush=True)
    if flags := counted(job.flags):
        log.info("%s: %s, %s", path, count_of(len(job.rows), "sequence"), flags)
        print(f"capture: {count_of(len(job.rows), 'sequence')}, {flags}", file=plain, flush=True)
    return n


def _refuse_pipe(transcripts: str | Path) -> None:
    if not Path(transcripts).is_file():
        raise InputError(f"{transcripts} is a pipe, which workers cannot read: save it as a file")


def _worker_device(model: GptOss, wanted: str | None) -> str:
    """Return the device type on which workers load the model; warn of weights in this process that take their room."""
    if model.device.type == "cuda":
        log.warning(
            "this process holds the model on %s beside the workers' own copies: load it with device='meta'",
            model.device,
        )
    own = "auto" if model.device.type == "meta" else model.device.type
    return cluster.worker_device(own) if wanted is None else wanted


def dry_run(
    model: GptOss | ShapeModel,
    transcripts: str | Path,
    path: str | Path,
    *,
    record: Sequence[recording.RecordOption],
    unit_tokens: int,
    strict: bool = False,
    exclude: str | None = None,
    routing: str = "own",
    tokens_per_second: float | None = None,
) -> estimate.Estimate:
    """Return the memory, disk and time that `capture` with these arguments would take; nothing is written."""
    job = plan_job(
        model, transcripts, record=record, unit_tokens=unit_tokens, strict=strict, exclude=exclude, routing=routing
    )
    pending = _pending(job, path)
    return estimate.estimate(model, job.rows, job.spec, job.layout, pending, path, tokens_per_second)


def _check_run_path(path: str | Path, inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Check that the path of a run is not an input, a file, a device or a pipe; a link to a run can be resumed."""
    if "://" in str(path):
        return
    target = Path(path)
    if overwrite or not target.is_dir():
        check_kind(target)
    if target.is_file():
        raise InputError(f"{path} is a file, expected a folder: a run is stored as a folder")
    refuse_inputs(target, inputs)


def _pending(job: JobPlan, path: str | Path | None) -> list[int]:
    """Return units that a run at this path lacks, or all if there is none."""
    every = list(range(len(job.layout.units)))
    if path is None:
        return every
    try:
        committed = open_run(path).committed
    except InputError:
        return every
    # a run of another layout is refused when the writer opens it
    return [int(u) for u in np.flatnonzero(~committed)] if len(committed) == len(every) else every


def _refuse_full_disk(model: GptOss, job: JobPlan, pending: Sequence[int], path: str | Path) -> None:
    """Refuse a job whose run would not fit on the disk, which is measured if it does not hold everything uncompressed.

    Without weights nothing can be measured, and the log warns instead.
    """
    free = estimate.free_bytes(path)
    if not pending or free is None or (size := estimate.raw_bytes(model, job.spec, job.layout, pending)) <= free:
        return
    if model.device.type == "meta":
        log.warning(
            "%s: %d bytes before compression, and the disk has %d: `capture --dry-run` measures whether they fit",
            path,
            size,
            free,
        )
    else:
        expected = estimate.estimate(model, job.rows, job.spec, job.layout, pending, path)
        estimate.refuse_what_cannot_fit(expected, path)
