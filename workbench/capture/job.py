"""The capture job: transcripts through the model, unit by unit, into a run.

Every sequence's length is known before the first forward pass, so the run is laid out first; then each
unit is computed, written and committed, here or by workers. Starting the same job again goes on where the last one
stopped, whoever computed what: a unit's content depends on the unit alone.
"""

import hashlib
import logging
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench import harmony
from workbench.capture import estimate, pipeline, recording
from workbench.capture.compute import Computed
from workbench.capture.host_routing import with_host_routes
from workbench.capture.plan import plan_units
from workbench.capture.shape_model import ShapeModel
from workbench.capture.tables import message_table, sequence_table
from workbench.errors import InputError, JobError
from workbench.harmony.flags import counted, read_flags, sequence_flags
from workbench.harmony.transcripts import Reject, Transcript, read_transcripts
from workbench.inputs import regular_file
from workbench.model.transformer import GptOss
from workbench.outputs import check_kind, check_output, made_parents, refuse_inputs, sha256
from workbench.progress import progress
from workbench.runs import Run, open_run
from workbench.runs.schema import Layout, Spec
from workbench.runs.writer import RunWriter, open_writer
from workbench.signals import StopSignal
from workbench.version import version as workbench_version

log = logging.getLogger("workbench.capture")
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")


@dataclass(frozen=True)
class Plan:
    """A job that is laid out: what is read, recorded and written where. digest: SHA-256 of the transcripts' bytes."""

    spec: Spec
    digest: str
    rows: list[Transcript]
    rejects: list[Reject]
    layout: Layout
    flags: list[tuple[str, ...]]  # of each row, see `workbench.harmony.flags`


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
    log_path = _log_path(path, log_file, inputs)
    shared = workers > 1 or dask is not None
    worker_device = _worker_device(model, worker_device) if shared else None
    if model.device.type == "meta" and not shared:
        raise InputError(
            "the model is on the device 'meta', without weights: load it on another device, or let workers load it "
            "with workers=2 or more"
        )
    job = plan(
        model, transcripts, record=record, unit_tokens=unit_tokens, strict=strict, exclude=exclude, routing=routing
    )
    _refuse_full_disk(model, job, _pending(job, None if overwrite else path), path)
    with (
        writer_of(job, model, transcripts, path, device=worker_device, overwrite=overwrite) as writer,
        _logged(log_path),
        StopSignal(str(path)) as interrupt,
    ):
        pending = writer.pending()
        n = sum(len(job.rows[s].tokens) for u in pending for s in job.layout.units[u].sequences)
        sizes = recording.bytes_per_token(job.spec, model.cfg)
        each = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        begins = (
            f"{len(pending):,} of {len(job.layout.units):,} units to go, {n:,} tokens, "
            f"each {sum(sizes.values()):,} bytes"
        )
        log.info("%s: %s before compression: %s", path, begins, each)
        print(f"capture: {begins} before compression ({each})", file=sys.stderr, flush=True)
        if found := counted(job.flags):
            log.info("%s: %d sequences, %s", path, len(job.rows), found)
            print(f"capture: {len(job.rows):,} sequences, {found}", file=sys.stderr, flush=True)
        with progress("capture", n, "tokens") as advance:
            done = _Done(advance, len(job.layout.units))
            try:
                if shared and not Path(transcripts).is_file():
                    raise InputError(f"{transcripts} is a pipe, which workers cannot read: save it as a file")
                if shared:
                    from workbench.capture import cluster  # late: dask is an extra

                    task = cluster.Task.of(
                        model,
                        transcripts,
                        path,
                        record,
                        unit_tokens,
                        max(1, torch.get_num_threads() // workers),
                        worker_device,
                        exclude,
                        routing,
                    )
                    cluster.run(
                        task, job.layout, pending, workers=workers, address=dask, check=interrupt.check, done=done
                    )
                else:
                    pipeline.run(model, job.rows, job.spec, writer, pending, check=interrupt.check, done=done.unit)
            except BaseException as error:
                log.error("%s: %s after %d of %d units", path, _one_line(error), done.units, len(pending))
                raise
        writer.finish()
        written = open_run(path)
        _ = written.sequences  # a damaged table is refused here, where it leaves no log
        log.info("%s: complete", path)
    return written


def _worker_device(model: GptOss, wanted: str | None) -> str:
    """Return the device type on which workers load the model; warn of weights in this process that take their room."""
    from workbench.capture import cluster  # late: dask is an extra

    if model.device.type == "cuda":
        log.warning(
            "this process holds the model on %s beside the workers' own copies: load it with device='meta'",
            model.device,
        )
    own = "auto" if model.device.type == "meta" else model.device.type
    return cluster.worker_device(own) if wanted is None else wanted


def plan(
    model: GptOss | ShapeModel,
    transcripts: str | Path,
    *,
    record: Sequence[recording.RecordOption],
    unit_tokens: int,
    strict: bool = False,
    exclude: str | None = None,
    routing: str = "own",
) -> Plan:
    """Read the transcripts and lay out the run; nothing is written.

    Raises:
        InputError: a row cannot be used, or no sequence is left.
    """
    spec = recording.parse(record, model.cfg, routing)
    unwanted = set(read_flags(exclude))
    found, rejects, digest = _read(model, transcripts)
    if not found:
        raise InputError(f"{transcripts}: none of the {len(rejects)} rows can be used; the first: {_why(rejects[0])}")
    if strict and rejects:
        raise InputError(f"{transcripts}: {len(rejects)} rows cannot be used; the first: {_why(rejects[0])}")
    rows: list[Transcript] = []
    flags: list[tuple[str, ...]] = []
    for row, has in zip(found, [_flags(row, model) for row in found], strict=True):
        if unwanted.isdisjoint(has):
            rows.append(row)
            flags.append(has)
        else:
            rejects.append(Reject(0, row.id, f"excluded: {' '.join(sorted(unwanted.intersection(has)))}"))
    if not rows:
        raise InputError(f"{transcripts}: --exclude {exclude} leaves none of {len(found):,} sequences")
    if spec.host_routing:
        rows = with_host_routes(rows, transcripts, model.cfg)
    return Plan(spec, digest, rows, rejects, plan_units([len(row.tokens) for row in rows], unit_tokens), flags)


def _read(model: GptOss | ShapeModel, transcripts: str | Path) -> tuple[list[Transcript], list[Reject], str]:
    """Return the transcripts, the rows that cannot be used, and the digest of the bytes that were read."""
    path = Path(transcripts)
    try:
        with regular_file(transcripts) as path:
            digest, before = sha256(path), path.stat()
            rows, rejects = read_transcripts(path, tokenizer=model.tokenizer, n_ctx=model.cfg.n_ctx)
            after = path.stat()
    except InputError as error:
        raise InputError(str(error).replace(str(path), str(transcripts))) from error
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise InputError(f"{transcripts} was changed while it was read; start again when it is complete")
    return rows, rejects, digest


def _flags(row: Transcript, model: GptOss | ShapeModel) -> tuple[str, ...]:
    labels = harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt)
    return sequence_flags(labels, row.n_prompt, complete=row.complete, notes=row.notes)


def writer_of(
    job: Plan,
    model: GptOss,
    transcripts: str | Path,
    path: str | Path,
    *,
    device: str | None = None,
    overwrite: bool = False,
) -> RunWriter:
    """Return the writer of a job's run, made or resumed. device: of the workers, if `model` is not on theirs."""
    return open_writer(
        path,
        overwrite=overwrite,
        layout=job.layout,
        sequences=sequence_table(job.rows, job.layout, job.flags),
        messages=message_table(
            harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt) for row in job.rows
        ),
        model=model.cfg.to_json(),
        checkpoint={"digest": model.checkpoint.digest, "name": model.checkpoint.path.name},
        spec=job.spec,
        provenance=_provenance(transcripts, job, model, device),
    )


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
    job = plan(
        model, transcripts, record=record, unit_tokens=unit_tokens, strict=strict, exclude=exclude, routing=routing
    )
    pending = _pending(job, path)
    return estimate.estimate(model, job.rows, job.spec, job.layout, pending, path, tokens_per_second)


def _check_run_path(path: str | Path, inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Check that the path of a run is no input and no file, device or pipe; a link to a run can be resumed."""
    if "://" in str(path):
        return
    target = Path(path)
    if overwrite or not target.is_dir():
        check_kind(target)
    if target.is_file():
        raise InputError(f"{path} is a file: a run is a folder")
    refuse_inputs(target, inputs)


def _pending(job: Plan, path: str | Path | None) -> list[int]:
    """Units that a run at this path lacks, or all if there is none."""
    every = list(range(len(job.layout.units)))
    if path is None:
        return every
    try:
        committed = open_run(path).committed
    except InputError:
        return every
    # a run of another layout is refused when the writer opens it
    return [int(u) for u in np.flatnonzero(~committed)] if len(committed) == len(every) else every


def _refuse_full_disk(model: GptOss, job: Plan, pending: Sequence[int], path: str | Path) -> None:
    """Measure only where the disk would not even hold everything uncompressed; without weights, warn."""
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
        found = estimate.estimate(model, job.rows, job.spec, job.layout, pending, path)
        estimate.refuse_what_cannot_fit(found, path)


class _Done:
    """Counts what is committed; units come from several threads."""

    def __init__(self, advance: Any, of: int) -> None:
        self._advance, self._of, self._lock = advance, of, threading.Lock()
        self.units = 0

    def unit(self, computed: Computed, seconds: float) -> None:
        size = sum(v.nbytes for v in (*computed.tokens.values(), *computed.records.values()))
        self.committed(computed.unit.index, len(computed.tokens["id"]), size, seconds)

    def committed(self, index: int, tokens: int, size: int, seconds: float) -> None:
        with self._lock:
            self.units += 1
            self._advance(tokens, size)
        rate, speed = tokens / seconds, size / seconds / 1e6
        log.info(
            "unit %d of %d: %d tokens in %.1f s, %.0f tokens/s, %.1f MB/s",
            index,
            self._of,
            tokens,
            seconds,
            rate,
            speed,
        )


def _log_path(path: str | Path, file: str | Path | None, inputs: Sequence[str | Path]) -> Path | None:
    """Return the file to log to: the one that was asked for, or one beside a local run.

    Raises:
        InputError: it is something that no job logged to, or lies in the run.
    """
    if file is None and "://" in str(path):
        return None
    target = Path(file) if file is not None else Path(f"{str(path).rstrip('/')}.log")
    real, run = Path(os.path.realpath(target)), Path(os.path.realpath(path))
    if "://" not in str(path) and (real == run or run in real.parents):
        raise InputError(f"--log {target} lies in the run {path}: choose a file outside")
    return check_output(target, command="capture", inputs=inputs, overwrite=True, owned=_is_log)


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins as the log of a job does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(200)
    return not start or _LOG_LINE.match(start) is not None


@contextmanager
def _logged(target: Path | None) -> Iterator[None]:
    """What happens goes to the log file too, a line each, behind what is there; a refused start leaves no new log."""
    if target is None:
        yield
        return
    is_new = not target.exists()
    with made_parents(target):
        handler = logging.FileHandler(target, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        if is_new and not isinstance(error, JobError):
            target.unlink(missing_ok=True)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _provenance(transcripts: str | Path, job: Plan, model: GptOss, device: str | None) -> dict[str, Any]:
    packages = ("torch", "transformer-lens", "numpy", "zarr")
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "process": os.getpid(),
        "software": {"workbench": workbench_version(), "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "harmony": harmony.distribution(),
        "tokenizer": {
            "name": model.tokenizer.name,
            "digest": model.tokenizer.digest,
            "chat_template": hashlib.sha256((model.tokenizer.chat_template or "").encode()).hexdigest(),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device or ",".join(dict.fromkeys(map(str, model.devices))),
        "transcripts": {
            "name": Path(transcripts).name,
            "digest": job.digest,
        },
        "rejects": [{"line": r.line, "id": r.id, "reason": r.reason} for r in job.rejects],
    }


def _why(reject: Reject) -> str:
    return f"line {reject.line}, {reject.reason}"
