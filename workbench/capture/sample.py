"""Estimate the bytes of a run on disk from a sample that is compressed and not stored.

The store of the sample is made in a temporary folder, then its unit is encoded by the writer of runs itself, and the
files are counted instead of being written. The bytes of tokens, of sequences and of units are scaled up each by
their own number, so that a small sample does for a large run.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd

from workbench import harmony
from workbench.capture.compute import Computed
from workbench.capture.tables import message_table, sequence_table
from workbench.harmony.transcripts import Transcript
from workbench.runs import shards
from workbench.runs.schema import EXAMPLE_GROUPS, Layout, Spec, arrays
from workbench.runs.storage import LocalStorage
from workbench.runs.totals import PER_UNIT
from workbench.runs.writer import open_writer

_OF_ROUTING = ("expert_count", "gate_sum", *PER_UNIT)


@dataclass(frozen=True)
class Job:
    """How much is to be written: tokens, sequences and units, and groups of effort and task in the totals."""

    tokens: int
    sequences: int
    units: int
    groups: int


class _CountedStorage(LocalStorage):
    """A run whose tables and metadata are in a folder, and whose units are counted, not written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sizes: dict[str, int] = defaultdict(int)

    def put(self, key: str, parts: Iterable[bytes]) -> None:
        """Count the bytes of a file by the array it belongs to."""
        self.sizes["/".join(key.split("/")[:2])] += sum(map(len, parts))

    def written(self) -> int:
        """Return the bytes of the tables and the metadata."""
        return sum((self.path / key).stat().st_size for key in self.files())


def disk_bytes(
    model: Any, spec: Spec, computed: Computed, rows: Sequence[Transcript], layout: Layout, job: Job
) -> dict[str, int]:
    """Return the bytes on disk of each record of a job, from one computed unit: tokens, records, then tables.

    layout: of the sample alone, whose only unit was computed from `rows`.
    """
    summaries = computed.summarised(model.cfg.num_experts)
    with tempfile.TemporaryDirectory() as folder:
        storage = _CountedStorage(Path(folder) / "sample.zarr")
        labels = [harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt) for row in rows]
        with open_writer(
            storage,
            layout=layout,
            sequences=sequence_table(rows, layout, [()] * len(rows)),
            messages=message_table(labels),
            model=model.cfg.to_json(),
            checkpoint={"digest": "", "name": ""},
            spec=spec,
            provenance={"transcripts": {"digest": ""}},
        ) as writer:
            metadata = storage.written()
            tables = sum(p.stat().st_size for t in ("sequences", "messages") for p in (storage.path / t).rglob("c/*"))
            writer.write_unit(0, computed.tokens, computed.records, summaries)
    dims = {name: array.dims for name, array in arrays(model.cfg.to_json(), spec, layout).items()}
    sizes: dict[str, int] = defaultdict(int)
    sample = Job(len(computed.tokens["id"]), len(rows), 1, 1)
    for name, size in storage.sizes.items():
        sizes[record_of(name)] += round(size * _scale(name, dims.get(name, ("unit",)), sample, job))
    for name, size in _totals(summaries).items():
        sizes[record_of(f"summaries/{name}")] += size * (1 if _of_run(name) else job.groups)
    sizes["tables and metadata"] += metadata - tables + round(tables * job.sequences / len(rows))
    return dict(sizes)


def _scale(name: str, dims: tuple[str, ...], sample: Job, job: Job) -> float:
    """Return how many times what the sample has of an array the job has."""
    if "token" in dims:
        return job.tokens / sample.tokens
    return job.units if dims[0] == "unit" else job.sequences / sample.sequences


def _of_run(name: str) -> bool:
    return name in PER_UNIT or name.endswith("_sketch")


def _totals(summaries: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the bytes of each summary added up: of a group, or of the run."""
    sizes = {}
    for name, values in summaries.items():
        if name.startswith(EXAMPLE_GROUPS):
            continue
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        total = values if _of_run(name) else values.sum(0, dtype=wide)
        sizes[name] = len(Zstd(level=shards.LEVEL).encode(np.ascontiguousarray(total.astype(wide))))
    return sizes


def record_of(array: str) -> str:
    """Return the record that an array of the store belongs to, as `bytes_per_token` names it."""
    kind, _, name = array.partition("/")
    own = name.rsplit("_", 1)[0] if kind == "summaries" else name
    known = {
        "manifest": "tables and metadata",
        "tokens": "tokens",
        "attention": "sinks",
        "examples": "examples",
        "neurons": "neurons",
        "features": "features",
        "routing": "router_logits" if name == "logits" else "routing",
    }
    if kind == "summaries":
        known |= {kind: "routing" if name in _OF_ROUTING else "tokens" if name in ("sequence", "tokens") else own}
    record = known.get(kind, own)
    return "sinks" if record == "sink" else record
