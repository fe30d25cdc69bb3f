"""Estimate a capture before it starts: units, bytes, time, memory and disk; refuse it if it cannot fit.

Bytes before compression are exact. What they take on disk is measured on a sample: the job's own first unit, or as much
of it as is computed in some seconds; so is the speed. Of a published shape without weights the sample is of random
numbers, and the speed is an estimate for one H100, labelled as such.
"""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from workbench.capture import recording
from workbench.capture.compute import Computed, compute
from workbench.capture.pipeline import IN_FLIGHT
from workbench.capture.plan import plan_units
from workbench.capture.record_buffers import Buffers, pinned_bytes
from workbench.capture.sample import Job, disk_bytes, record_of
from workbench.capture.shape_model import ShapeModel, sample_transcripts
from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript
from workbench.model.config import Config
from workbench.model.memory import human
from workbench.model.packing import FORWARD_TOKENS, passes
from workbench.model.transformer import GptOss
from workbench.runs.schema import CHUNK, Layout, Spec, arrays

_SAMPLE_S = 20  # of computing a sample of the job
_SAMPLE_BYTES = 256 * 2**20  # of its records before compression
_SPARE = 1.1  # a plan is refused unless the disk has this many times what is expected
# One H100: two operations a parameter in use, at 30 % of its 989 bfloat16 TFLOP/s: 41,000 tokens/s for gpt-oss-20b and
# 29,000 for 120b. Passes of 8,192 tokens with random weights ran at 52,000 and 26,800, and took 1 % more time when
# routing and sinks were recorded, see docs/benchmarks.md. Compression and writing at 1 GB/s, of which
# `workbench bench store` measured 1.2 on two cores.
_H100_FLOPS = 0.3 * 989e12
_WRITTEN_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Estimate:
    """The estimate of a job. tokens, raw_bytes and memory_bytes are exact; disk and seconds come from a sample.

    per_token: bytes of a token by record, before compression. raw, disk: bytes of all by record, sums over sequences
    and units included. free_bytes is None where it is unknown. speed: where the seconds come from.
    """

    units: int
    done: int
    sequences: int
    tokens: int
    raw_bytes: int
    per_token: dict[str, int]
    memory_bytes: int
    seconds: float
    free_bytes: int | None
    raw: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    speed: str = ""

    @property
    def disk_bytes(self) -> int:
        """Return the bytes of the finished run's files, or of what is left to write."""
        return sum(self.disk.values())

    @property
    def fits(self) -> bool:
        """Return whether the disk has room for the rest of the job."""
        return self.free_bytes is None or self.disk_bytes * _SPARE <= self.free_bytes


def estimate(
    model: GptOss | ShapeModel,
    rows: Sequence[Transcript],
    spec: Spec,
    layout: Layout,
    pending: Sequence[int],
    path: str | Path | None,
    tokens_per_second: float | None = None,
) -> Estimate:
    """Return the estimate of a job with these pending units.

    path: of the run, None to leave free space unknown. tokens_per_second: replaces the measured or estimated speed.
    """
    left = [s for u in pending for s in layout.units[u].sequences]
    tokens = sum(layout.lengths[s] for s in left)
    fullest = max((sum(layout.lengths[s] for s in layout.units[u].sequences) for u in pending), default=0)
    raw = raw_by_record(model, spec, layout, pending)
    rate, speed, disk = 1.0, "", {}
    if pending:
        first = [rows[s] for s in layout.units[pending[0]].sequences]
        rate, computed, part = (
            _measured(model, first, spec) if isinstance(model, GptOss) else _shaped(model, first, spec)
        )
        groups = len({(rows[s].effort, str(rows[s].meta.get("task", ""))) for s in left})
        job = Job(tokens, len(left), len(pending), groups)
        disk = disk_bytes(model, spec, computed, part, _one_unit(part), job)
        speed = "as one pass measured"
    if not isinstance(model, GptOss):
        rate, speed = _estimated_rate(model.cfg, sum(raw.values()) / max(1, tokens))
    if tokens_per_second is not None:
        rate, speed = tokens_per_second, "as you gave it"
    return Estimate(
        units=len(layout.units),
        done=len(layout.units) - len(pending),
        sequences=len(rows),
        tokens=tokens,
        raw_bytes=sum(raw.values()),
        per_token=recording.bytes_per_token(spec, model.cfg),
        memory_bytes=_buffer_bytes(model, spec, layout, fullest) * min(IN_FLIGHT, max(1, len(pending))),
        seconds=tokens / rate,
        free_bytes=None if path is None else free_bytes(path),
        raw=raw,
        disk=disk,
        speed=speed,
    )


def for_tokens(
    model: ShapeModel,
    spec: Spec,
    tokens: int,
    *,
    sequence_tokens: int,
    unit_tokens: int,
    tokens_per_second: float | None = None,
) -> Estimate:
    """Return the estimate of a capture of about this many tokens, in sequences of equal length that do not exist."""
    n = max(1, round(tokens / sequence_tokens))
    layout = plan_units([sequence_tokens] * n, unit_tokens)
    rows = sample_transcripts(model.tokenizer, len(layout.units[0].sequences), sequence_tokens)
    rows += [rows[0]] * (n - len(rows))  # of the others only the number is used
    return estimate(model, rows, spec, layout, range(len(layout.units)), None, tokens_per_second)


def raw_bytes(model: GptOss | ShapeModel, spec: Spec, layout: Layout, pending: Sequence[int]) -> int:
    """Return the bytes that these units will write, before compression."""
    return sum(raw_by_record(model, spec, layout, pending).values())


def raw_by_record(model: GptOss | ShapeModel, spec: Spec, layout: Layout, pending: Sequence[int]) -> dict[str, int]:
    """Return the bytes that these units will write, before compression, by record."""
    rows = sum(layout.lengths[s] for u in pending for s in layout.units[u].sequences)
    sizes: Counter[str] = Counter()
    for name, array in arrays(model.cfg.to_json(), spec, layout).items():
        if "token" in array.dims:
            sizes[record_of(name)] += _row_bytes(array.shape, array.axis, array.dtype) * rows
        else:
            sizes[record_of(name)] += _row_bytes(array.shape, 0, array.dtype) * array.per_unit * len(pending)
    return dict(sizes)


def show(plan: Estimate, title: str) -> None:
    """Print the estimate as tables."""
    console = Console()
    table = Table("", "", title=title, show_header=False)
    table.add_row("units", f"{plan.units:,}, {plan.done:,} of them written")
    table.add_row("sequences, tokens to go", f"{plan.sequences:,}, {plan.tokens:,}")
    table.add_row("disk", f"about {human(plan.disk_bytes)} to write, {human(plan.raw_bytes)} before compression")
    table.add_row("disk free", "unknown" if plan.free_bytes is None else human(plan.free_bytes))
    table.add_row("memory of record buffers", human(plan.memory_bytes))
    rate = plan.tokens / plan.seconds if plan.seconds else 0
    table.add_row("time", f"about {_clock(plan.seconds)} at {rate:,.0f} tokens/s, {plan.speed}".removesuffix(", "))
    console.print(table)
    sizes = Table("record", "bytes a token", "before compression", "on disk", title="Disk by record, sums included")
    for column in sizes.columns[1:]:
        column.justify = "right"
    for name in plan.raw | plan.disk:
        token_bytes = f"{plan.per_token[name]:,}" if name in plan.per_token else ""
        sizes.add_row(
            name, token_bytes, human(plan.raw[name]) if name in plan.raw else "", human(plan.disk.get(name, 0))
        )
    console.print(sizes)


def refuse_what_cannot_fit(plan: Estimate, path: str | Path) -> None:
    """Raise an error if the disk is too small.

    Raises:
        InputError: the job needs more bytes than the disk has.
    """
    if not plan.fits:
        assert plan.free_bytes is not None
        raise InputError(
            f"{path}: about {human(plan.disk_bytes)} would be written, and the disk has {human(plan.free_bytes)}: "
            "record less (layers, every=, reduce=), or write elsewhere"
        )


def _measured(model: GptOss, first: Sequence[Transcript], spec: Spec) -> tuple[float, Computed, Sequence[Transcript]]:
    """Return tokens a second, and a computed sample of the next unit with its transcripts."""
    part = first[: len(next(passes((len(row.tokens) for row in first), FORWARD_TOKENS)))]
    for _ in range(2):  # the first pass of a process pays for what the others find ready; a long one is not repeated
        begun = time.perf_counter()
        computed = _computed(model, part, spec)
        seconds = time.perf_counter() - begun
        if seconds > _SAMPLE_S:
            break
    rate = _tokens(part) / seconds
    sample = _sample(first, spec, model.cfg)
    if len(sample) > len(part) and _tokens(sample) / rate <= _SAMPLE_S:
        part, computed = sample, _computed(model, sample, spec)
    return rate, computed, part


def _shaped(model: ShapeModel, first: Sequence[Transcript], spec: Spec) -> tuple[float, Computed, Sequence[Transcript]]:
    """Return a sample of random numbers with its transcripts, and a speed that is not meaningful."""
    part = _sample(first, spec, model.cfg)
    return 1.0, _computed(model, part, spec), part


def _sample(first: Sequence[Transcript], spec: Spec, cfg: Config) -> list[Transcript]:
    """Return the first of these transcripts that together are small enough to hold; at least one."""
    token_bytes = sum(recording.bytes_per_token(spec, cfg).values())
    total = np.cumsum([len(row.tokens) for row in first]) * token_bytes
    return list(first[: max(1, int(np.searchsorted(total, _SAMPLE_BYTES, side="right")))])


def _tokens(rows: Sequence[Transcript]) -> int:
    return sum(len(row.tokens) for row in rows)


def _one_unit(rows: Sequence[Transcript]) -> Layout:
    return plan_units([len(row.tokens) for row in rows], -(-_tokens(rows) // CHUNK) * CHUNK)


def _computed(model: Any, part: Sequence[Transcript], spec: Spec) -> Computed:
    buffers = Buffers(spec, model.cfg, _tokens(part), pinned=False)
    if isinstance(model, GptOss) or not spec.logprobs:
        return compute(model, _one_unit(part).units[0], part, spec, buffers)
    computed = compute(model, _one_unit(part).units[0], part, replace(spec, logprobs=False), buffers)
    rng = np.random.default_rng(0)  # logits of the published vocabulary would take longer than all others
    both = {name: rng.exponential(size=_tokens(part)).astype(np.float32) for name in ("logprob", "entropy")}
    return computed._replace(records=computed.records | {"logprob": -both["logprob"], "entropy": both["entropy"]})


def _estimated_rate(cfg: Config, bytes_per_token: float) -> tuple[float, str]:
    """Return tokens a second of one H100, and what limits it."""
    computing, writing = _H100_FLOPS / (2 * cfg.n_active_params), _WRITTEN_BYTES_PER_S / max(1.0, bytes_per_token)
    what = "computing" if computing <= writing else "writing at 1 GB/s before compression"
    return min(computing, writing), f"estimated for one H100, limited by {what}"


def _buffer_bytes(model: GptOss | ShapeModel, spec: Spec, layout: Layout, tokens: int) -> int:
    """Return the bytes of the buffers of a unit; pinned ones, which a model on GPUs has, take whole powers of two."""
    sizes = {name: tokens * size for name, size in _per_row(model, spec, layout).items()}
    if model.device.type == "cuda":
        sizes = {n: size if n.startswith("tokens/") else pinned_bytes(size) for n, size in sizes.items()}
    return sum(sizes.values())


def _per_row(model: GptOss | ShapeModel, spec: Spec, layout: Layout) -> dict[str, int]:
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
