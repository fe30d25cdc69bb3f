"""The plan of a capture job, before anything is computed: transcripts that are read, the layout, and the run's writer.

Every sequence's length is known before the first forward pass, so the run is laid out first. The process that starts
a job and each of its workers make the same plan from the same arguments.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench import harmony
from workbench.capture import recording
from workbench.capture.host_routing import with_host_routes
from workbench.capture.plan import plan_units
from workbench.capture.shape_model import ShapeModel
from workbench.capture.tables import message_table, sequence_table
from workbench.errors import InputError
from workbench.harmony.flags import read_flags, sequence_flags
from workbench.harmony.transcripts import Reject, Transcript, read_transcripts
from workbench.inputs import regular_file
from workbench.model.transformer import GptOss
from workbench.outputs import sha256
from workbench.runs.schema import Layout, Spec
from workbench.runs.writer import RunWriter, open_writer
from workbench.version import version as workbench_version


@dataclass(frozen=True)
class JobPlan:
    """A job that is laid out: what is read, recorded and written where. digest: SHA-256 of the transcripts' bytes."""

    spec: Spec
    digest: str
    rows: list[Transcript]
    rejects: list[Reject]
    layout: Layout
    flags: list[tuple[str, ...]]  # of each row, see `workbench.harmony.flags`


def plan_job(
    model: GptOss | ShapeModel,
    transcripts: str | Path,
    *,
    record: Sequence[recording.RecordOption],
    unit_tokens: int,
    strict: bool = False,
    exclude: str | None = None,
    routing: str = "own",
) -> JobPlan:
    """Read the transcripts and lay out the run; nothing is written.

    Raises:
        InputError: a row cannot be used, or no sequence is left.
    """
    spec = recording.parse(record, model.cfg, routing)
    unwanted = set(read_flags(exclude))
    read, rejects, digest = _read(model, transcripts)
    if not read:
        raise InputError(f"{transcripts}: none of the {len(rejects)} rows can be used; the first: {_why(rejects[0])}")
    if strict and rejects:
        raise InputError(f"{transcripts}: {len(rejects)} rows cannot be used; the first: {_why(rejects[0])}")
    rows: list[Transcript] = []
    flags: list[tuple[str, ...]] = []
    for row, has in zip(read, [_flags(row, model) for row in read], strict=True):
        if unwanted.isdisjoint(has):
            rows.append(row)
            flags.append(has)
        else:
            rejects.append(Reject(0, row.id, f"excluded: {' '.join(sorted(unwanted.intersection(has)))}"))
    if not rows:
        raise InputError(f"{transcripts}: --exclude {exclude} leaves none of {len(read):,} sequences")
    if spec.host_routing:
        rows = with_host_routes(rows, transcripts, model.cfg)
    return JobPlan(spec, digest, rows, rejects, plan_units([len(row.tokens) for row in rows], unit_tokens), flags)


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
        raise InputError(f"{transcripts} changed while it was being read: rerun the command when the file is complete")
    return rows, rejects, digest


def _flags(row: Transcript, model: GptOss | ShapeModel) -> tuple[str, ...]:
    labels = harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt)
    return sequence_flags(labels, row.n_prompt, complete=row.complete, notes=row.notes)


def job_writer(
    job: JobPlan,
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


def _provenance(transcripts: str | Path, job: JobPlan, model: GptOss, device: str | None) -> dict[str, Any]:
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
