"""Estimate a capture before it starts: units, bytes, time, memory and disk; refuse it if it cannot fit.

Bytes before compression are exact. The compression ratio and the speed are measured on the first forward pass of the
job's own transcripts, so a plan costs one pass.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs import Zstd
from rich.console import Console
from rich.table import Table

from workbench.capture import recording
from workbench.capture.compute import compute
from workbench.capture.pipeline import IN_FLIGHT
from workbench.capture.record_buffers import Buffers, pinned_bytes
from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript
from workbench.model.memory import human
from workbench.model.packing import FORWARD_TOKENS, passes
from workbench.model.transformer import GptOss
from workbench.runs.schema import Layout, Spec, Unit, arrays

_REPEAT_S = 20
_SPARE = 1.1  # a plan is refused unless the disk has this many times what is expected


@dataclass(frozen=True)
class Estimate:
    """The estimate of a job. tokens, raw_bytes and memory_bytes are exact; disk_bytes and seconds come from one pass.

    free_bytes is None where it is unknown.
    """

    units: int
    done: int
    sequences: int
    tokens: int
    raw_bytes: int
    per_token: dict[str, int]
    memory_bytes: int
    disk_bytes: int
    seconds: float
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Return whether the disk has room for the rest of the job."""
        return self.free_bytes is None or self.disk_bytes * _SPARE <= self.free_bytes


def estimate(
    model: GptOss, rows: Sequence[Transcript], spec: Spec, layout: Layout, pending: Sequence[int], path: str | Path
) -> Estimate:
    """Return the estimate of a job with these pending units."""
    left = [layout.units[u] for u in pending]
    tokens = sum(layout.lengths[s] for unit in left for s in unit.sequences)
    raw = raw_bytes(model, spec, layout, pending)
    fullest = max((sum(layout.lengths[s] for s in unit.sequences) for unit in left), default=0)
    rate, ratio = _measured(model, rows, spec, left) if left else (1.0, 1.0)
    return Estimate(
        units=len(layout.units),
        done=len(layout.units) - len(left),
        sequences=len(rows),
        tokens=tokens,
        raw_bytes=raw,
        per_token=recording.bytes_per_token(spec, model.cfg),
        memory_bytes=_buffer_bytes(model, spec, layout, fullest) * min(IN_FLIGHT, max(1, len(left))),
        disk_bytes=round(raw * ratio),
        seconds=tokens / rate,
        free_bytes=free_bytes(path),
    )


def raw_bytes(model: GptOss, spec: Spec, layout: Layout, pending: Sequence[int]) -> int:
    """Return the bytes that these units will write, before compression."""
    per_row = _per_row(model, spec, layout)
    described = arrays(model.cfg.to_json(), spec, layout)
    others = sum(_row_bytes(a.shape, 0, a.dtype) * a.per_unit for n, a in described.items() if n not in per_row)
    rows = sum(layout.lengths[s] for u in pending for s in layout.units[u].sequences)
    return sum(per_row.values()) * rows + others * len(pending)


def show(plan: Estimate, path: str | Path) -> None:
    """Print the estimate as a table."""
    table = Table("", "", title=f"Capture into {path}", show_header=False)
    each = ", ".join(f"{name} {size:,}" for name, size in plan.per_token.items())
    table.add_row("units", f"{plan.units:,}, {plan.done:,} of them written")
    table.add_row("sequences, tokens to go", f"{plan.sequences:,}, {plan.tokens:,}")
    table.add_row("bytes a token, uncompressed", f"{sum(plan.per_token.values()):,}: {each}")
    table.add_row("bytes to write", f"{human(plan.raw_bytes)}, compressed about {human(plan.disk_bytes)}")
    table.add_row("disk free", "unknown" if plan.free_bytes is None else human(plan.free_bytes))
    table.add_row("memory of record buffers", human(plan.memory_bytes))
    rate = plan.tokens / plan.seconds if plan.seconds else 0
    table.add_row("time", f"about {_clock(plan.seconds)} at {rate:,.0f} tokens/s, as one pass measured")
    Console().print(table)


def refuse_what_cannot_fit(plan: Estimate, path: str | Path) -> None:
    """Raise an error if the disk is too small.

    Raises:
        InputError: the job needs more bytes than the disk has.
    """
    if not plan.fits:
        assert plan.free_bytes is not None
        raise InputError(
            f"{path}: about {human(plan.disk_bytes)} are to be written and the disk has {human(plan.free_bytes)}: "
            "record "
            "less (layers, every=, reduce=), or write elsewhere"
        )


def _measured(model: GptOss, rows: Sequence[Transcript], spec: Spec, left: Sequence[Unit]) -> tuple[float, float]:
    """Return tokens a second and the compression ratio of the next forward pass."""
    own = [rows[s] for s in left[0].sequences]
    first = own[: len(next(passes((len(row.tokens) for row in own), FORWARD_TOKENS)))]
    unit = Unit(0, 0, 0, tuple(range(len(first))))
    buffers = Buffers(spec, model.cfg, sum(len(row.tokens) for row in first), pinned=False)
    for _ in range(2):  # the first pass of a process pays for what the others find ready; a long one is not repeated
        begun = time.perf_counter()
        computed = compute(model, unit, first, spec, buffers)
        seconds = time.perf_counter() - begun
        if seconds > _REPEAT_S:
            break
    rate = len(computed.tokens["id"]) / seconds
    packer = Zstd(level=1)
    raw = packed = 0
    for values in (*computed.tokens.values(), *computed.records.values()):
        raw += values.nbytes
        packed += len(packer.encode(np.ascontiguousarray(values)))
    return rate, packed / raw


def _buffer_bytes(model: GptOss, spec: Spec, layout: Layout, tokens: int) -> int:
    """Return the bytes of the buffers of a unit; pinned ones, which a model on GPUs has, take whole powers of two."""
    sizes = {name: tokens * size for name, size in _per_row(model, spec, layout).items()}
    if model.device.type == "cuda":
        sizes = {n: size if n.startswith("tokens/") else pinned_bytes(size) for n, size in sizes.items()}
    return sum(sizes.values())


def _per_row(model: GptOss, spec: Spec, layout: Layout) -> dict[str, int]:
    described = arrays(model.cfg.to_json(), spec, layout)
    return {n: _row_bytes(a.shape, a.axis, a.dtype) for n, a in described.items() if "token" in a.dims}


def _row_bytes(shape: Sequence[int], axis: int, dtype: str) -> int:
    return int(np.prod([n for i, n in enumerate(shape) if i != axis])) * np.dtype(dtype).itemsize


def free_bytes(path: str | Path) -> int | None:
    """Return the free bytes of the disk of a local run, or None if unknown."""
    if "://" in str(path) and not str(path).startswith("file://"):
        return None
    folder = Path(str(path).removeprefix("file://")).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
