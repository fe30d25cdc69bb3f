"""Writing a run: all of it laid out first, then unit by unit, each committed by its flag.

What is written of a unit before its flag is invisible; a job killed at any moment leaves a run that the same call
goes on with, and that then equals an uninterrupted one, element by element.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Bool

from workbench.compression import MAX_TEXT_BYTES
from workbench.errors import InputError, JobError
from workbench.runs import manifest, shards, views
from workbench.runs.group import open_group
from workbench.runs.lock import Lock
from workbench.runs.reader import open_run
from workbench.runs.schema import (
    EXAMPLE_GROUPS,
    MANIFESTS,
    SCHEMA,
    STORED_AS,
    Activation,
    ArraySpec,
    Layout,
    Spec,
    Unit,
    arrays,
)
from workbench.runs.storage import ROOT, LocalStorage, ObjectStorage, Storage, storage_at

# where a job writes; groups that others add to a run are left alone
_OWN = (
    "zarr.",
    "units/",
    "manifest/",
    "totals/",
    "tokens/",
    "routing/",
    "attention/",
    "summaries/",
    "selected/",
    "activations/",
    "records/",
    "examples/",
    "neurons/",
    "features/",
    "sequences/",
    "messages/",
)
_MAY_BE_NAN = ("logprob", "entropy")  # where a sequence begins: nothing predicted its first token


def open_writer(
    path: str | Path | Storage,
    *,
    layout: Layout,
    sequences: pd.DataFrame,
    messages: pd.DataFrame,
    model: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    spec: Spec,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> "RunWriter":
    """Return a writer for the run at `path`, created or resumed; use it as a context manager.

    sequences: one row for each, in the order of the layout. messages: positions relative to their sequence. A run of
    another checkpoint, spec, transcripts or layout is refused by the field that differs. overwrite: replace a run that
    is there; something else is never replaced.

    Raises:
        InputError: the run belongs to another job; the message names the field that differs.
    """
    target = storage_at(path)
    if replaces := overwrite and _is_there(target):
        open_group(target, "r")  # refuses what is not a run
    identity = {
        "checkpoint digest": checkpoint["digest"],
        "transcripts digest": provenance["transcripts"]["digest"],
        "dtype": provenance.get("dtype", ""),
        "tokenizer digest": provenance.get("tokenizer", {}).get("digest", ""),
        "chat template digest": provenance.get("tokenizer", {}).get("chat_template", ""),
        "spec": spec.to_json(),
        "unit_tokens": layout.unit_tokens,
        "sequences": len(layout.lengths),
    }
    if replaces or not _is_there(target):
        attributes = {
            "schema": SCHEMA,
            "status": "writing",
            "model": dict(model),
            "checkpoint": dict(checkpoint),
            "spec": spec.to_json(),
            "provenance": dict(provenance),
            "unit_tokens": layout.unit_tokens,
            "identity": identity,
        }
        with Lock(target):
            if replaces or not _is_there(target):  # another job may have created it since
                _create(target, attributes, layout, sequences, messages, spec)
    group = open_group(target, "r+")
    identity["spec"] = spec.to_json(group.attrs["schema"])
    for name, wanted in json.loads(json.dumps(identity)).items():
        got = group.attrs["identity"].get(name)
        if got is None and group.attrs["schema"] < MANIFESTS and name.startswith(("tokenizer", "chat template")):
            continue  # older runs did not record it
        if got != wanted:
            one, other = difference(got, wanted)
            raise InputError(f"{target} was started with {name} {one}, and this job has {other}: choose another run")
    return RunWriter(target, group, layout, sequences)


def _is_there(target: Storage) -> bool:
    """Return whether something is at the target; in an object store, whether its creation was completed."""
    return target.exists(ROOT) if isinstance(target, ObjectStorage) else target.exists()


def _create(
    target: Storage,
    attributes: dict[str, Any],
    layout: Layout,
    sequences: pd.DataFrame,
    messages: pd.DataFrame,
    spec: Spec,
) -> None:
    """Create the store, with its tables and with arrays that hold no tokens."""
    with _disk_errors(target), target.new() as staging:
        group = zarr.create_group(str(staging), attributes=attributes)
        offsets = {"offset": layout.offsets, "length": layout.lengths}
        _write_table(group, "sequences", sequences.assign(**offsets), "sequence")
        _write_table(group, "messages", messages, "message")
        for name, array in arrays(attributes["model"], spec, layout).items():
            _create_array(group, name, array, spec)
        committed = group.create_group("units").create_array(
            "committed",
            shape=(len(layout.units),),
            chunks=(1,),
            dtype="bool",
            compressors=None,
            fill_value=False,
            dimension_names=("unit",),
        )
        committed.attrs["sequences"] = [len(unit.sequences) for unit in layout.units]
        committed.attrs["starts"] = [unit.start for unit in layout.units]
        committed.attrs["capacities"] = [unit.capacity for unit in layout.units]
        created = LocalStorage(staging)
        files = {key: manifest.entry([created.read(key)]) for key in created.files() if key != ROOT}
        manifest.write(created, manifest.CREATED, files)
        group.attrs["digest"] = manifest.attributes_digest(created.read(ROOT))


def _write_table(group: zarr.Group, name: str, table: pd.DataFrame, dim: str) -> None:
    columns = group.create_group(name, attributes={"columns": list(table.columns)})
    for column in table.columns:
        values, rows = table[column].to_numpy(), 65_536
        text = not (np.issubdtype(values.dtype, np.number) or values.dtype == bool)
        if text:
            values = table[column].fillna("").astype(str).to_numpy(dtype=object)
            longest = 4 + max((len(value.encode("utf-8", "replace")) for value in values), default=0)
            rows = min(rows, MAX_TEXT_BYTES // longest)
        array = columns.create_array(
            str(column),
            shape=values.shape,
            dtype="string" if text else values.dtype,
            chunks=(max(1, min(len(values), rows)),),
            compressors=shards.CODEC,
            dimension_names=(dim,),
            config={"write_empty_chunks": True},
        )
        if len(values):
            array[:] = values


def _create_array(group: zarr.Group, name: str, array: ArraySpec, spec: Spec) -> None:
    chunks = list(array.shape)
    grain = list(array.shape)
    chunks[array.axis], grain[array.axis] = array.chunk, array.per_unit
    if array.dims[0].startswith("layer"):  # a layer is what is read: [layer, token, …] is chunked by it
        chunks[0] = grain[0] = 1
    group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=tuple(chunks),
        shards=tuple(grain) if chunks != grain else None,
        compressors=shards.CODEC,
        fill_value=array.fill,
        dimension_names=array.dims,
        config={"write_empty_chunks": True},
        attributes=_attributes(name, spec),
    )


def _attributes(name: str, spec: Spec) -> dict[str, Any]:
    """Return the attributes that a reader of an array needs: how values are stored, and which are recorded."""
    kind, _, own = name.partition("/")
    if kind == "tokens":
        return views.flags(own)
    recorded = next((a for a in spec.selected if a.name == own), None)
    if recorded is None or kind not in ("activations", "records"):
        return {}
    about: dict[str, Any] = {"hook": recorded.hook, "layers": list(recorded.layers)}
    about |= {"index": list(recorded.index)} if recorded.index else {}
    if isinstance(recorded, Activation):
        return about | {"dtype": "bfloat16"}
    about |= {"reduce": recorded.reduce, "source_digest": recorded.digest} if recorded.reduce != "raw" else {}
    return about | {k: v for k, v in (("long_name", recorded.description), ("units", recorded.unit)) if v}


class RunWriter:
    """Writes units of one run; several threads may write different units."""

    def __init__(self, storage: Storage, group: zarr.Group, layout: Layout, sequences: pd.DataFrame) -> None:
        self.storage, self.group, self.layout = storage, group, layout
        self._ids = list(sequences["id"])
        self._spec = Spec.from_json(group.attrs["spec"])
        self._arrays = arrays(group.attrs["model"], self._spec, layout)
        self._lock = Lock(storage)

    def __enter__(self) -> "RunWriter":
        self._lock.acquire()
        for key in self.storage.files():
            # zarr's own, of a flag or an attribute, when a job was killed at it
            if key.endswith(".partial") and key.startswith(_OWN):
                self.storage.delete(key)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def pending(self) -> list[int]:
        """Return units not committed yet."""
        return np.flatnonzero(~self.group["units/committed"][:]).tolist()

    def write_unit(
        self,
        index: int,
        tokens: Mapping[str, np.ndarray],
        records: Mapping[str, np.ndarray],
        summaries: Mapping[str, np.ndarray],
    ) -> None:
        """Write the arrays of a unit [layer token ...], then its flag; values that are not finite are refused.

        summaries: sums by their names, and examples as "examples/…", "neurons/…" and "features/…".
        """
        unit = self.layout.units[index]
        self._check(unit, records)
        stored = {f"tokens/{name}": values for name, values in tokens.items()}
        stored |= {STORED_AS.get(name, name): values for name, values in records.items()}
        stored |= {n if n.startswith(EXAMPLE_GROUPS) else f"summaries/{n}": values for n, values in summaries.items()}
        if not self._spec.sinks:
            stored.pop("attention/sink", None)  # only its sums are kept
        stored["summaries/sequence"] = np.array(unit.sequences, dtype=np.int32)
        optional = {f"tokens/{name}" for name in _MAY_BE_NAN}
        assert set(stored) | optional == set(self._arrays) | optional, set(stored) ^ set(self._arrays)
        listed: dict[str, manifest.Entry] = {}
        with _disk_errors(self.storage):
            shards.write(
                call
                for name, array in self._arrays.items()
                for call in self._writes(unit, name, array, stored.get(name), listed)
            )
            if manifest.has_manifests(self.group.attrs):
                manifest.write(self.storage, manifest.unit_key(index), listed)
            self.group["units/committed"][index] = True

    def _writes(
        self,
        unit: Unit,
        name: str,
        array: ArraySpec,
        values: np.ndarray | None,
        listed: dict[str, manifest.Entry],
    ) -> Iterator[Callable[[], None]]:
        """Return calls that write the unit's shards of an array; rows after the unit's own have the fill value.

        Chunks that hold the fill value only are written, too, so that a missing file is always damage.
        """
        start = unit.index if array.dims[0] == "unit" else unit.index * array.per_unit
        if values is None:
            assert "token" in array.dims
            values = np.full(unit.capacity, array.fill)
        values = values[None] if array.dims[0] == "unit" else values
        if "token" in array.dims:
            start = unit.start
        return shards.writes(self.group[name], self.storage, name, start, array.axis, values, listed)

    def _check(self, unit: Unit, records: Mapping[str, np.ndarray]) -> None:
        lengths = [self.layout.lengths[s] for s in unit.sequences]
        starts = np.cumsum([0, *lengths[:-1]])
        for name, values in records.items():
            if name.startswith("activations/"):
                finite = (values & 0x7F80) != 0x7F80  # an exponent of ones, in bfloat16's bits
            elif np.issubdtype(values.dtype, np.floating):
                finite = np.isfinite(values)
                if name in _MAY_BE_NAN:
                    finite[starts] = True
                elif name == "router_logits":
                    finite |= self._absent_experts
            else:
                continue
            if not finite.all():
                self._refuse(unit, name, np.argwhere(~finite)[0], starts)

    @cached_property
    def _absent_experts(self) -> Bool[np.ndarray, "layer token expert"]:
        """Return where a layer has no expert of this number, as in models whose layers differ: NaN is right there."""
        model = self.group.attrs["model"]
        own = model.get("layer_experts") or [model["num_experts"]] * model["n_layers"]
        return np.arange(model["num_experts"]) >= np.array(own)[:, None, None]

    def _refuse(self, unit: Unit, name: str, where: np.ndarray, starts: np.ndarray) -> None:
        row = where[0] if name in _MAY_BE_NAN else where[1]
        sequence = int(np.searchsorted(starts, row, side="right")) - 1
        layer = ""
        if name not in _MAY_BE_NAN:
            own = name.partition("/")[2]
            chosen = next((a.layers for a in self._spec.selected if a.name == own), None)
            layer = f" in layer {chosen[where[0]] if chosen else where[0]}"
        raise JobError(
            f"{name} is not finite{layer}, sequence {self._ids[unit.sequences[sequence]]!r} at position "
            f"{int(row - starts[sequence])}: unit {unit.index} was not written; check the checkpoint's values"
        )

    def finish(self) -> None:
        """Add up the totals and mark the run complete; every unit must be committed."""
        if pending := self.pending():
            raise RuntimeError(f"{self.storage}: {len(pending)} units are not committed: the run is incomplete")
        if self.group.attrs["status"] == "complete":
            return
        with _disk_errors(self.storage):
            self._write_totals()
            if manifest.has_manifests(self.group.attrs):
                totals = [key for key in self.storage.files() if key.startswith("totals/")]
                manifest.write_complete(self.storage, totals, len(self.layout.units))
            self.group.attrs["status"] = "complete"

    def _write_totals(self) -> None:
        run = open_run(self.storage)
        totals = self.group.create_group("totals", overwrite=True)
        _write_table(totals, "groups", run.groups, "group")
        for name in run.summaries:
            total = run.total(name)
            array = totals.create_array(
                name,
                shape=total.shape,
                dtype=total.dtype,
                chunks=total.shape,
                compressors=shards.CODEC,
                dimension_names=total.dims,
                config={"write_empty_chunks": True},
            )
            array[:] = total.to_numpy()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _disk_errors(storage: Storage) -> Iterator[None]:
    """Raise a JobError that names the remedy where a disk is full, or a quota or a limit of file sizes is reached."""
    try:
        yield
    except OSError as error:
        grown = error.errno == errno.EFBIG and error.strerror != os.strerror(errno.EFBIG)  # of a file that was read
        if error.errno in _FULL and not grown:
            raise JobError(
                f"the disk of {storage} is full; free some space, then rerun the command to resume ({error.strerror})"
            ) from error
        raise


def difference(got: Any, wanted: Any, limit: int = 60) -> tuple[str, str]:
    """Return both values, cut so that where they differ is in what is left; of dictionaries and lists the items."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        name = next(name for name in {**got, **wanted} if got.get(name) != wanted.get(name))
        one, other = difference(got.get(name), wanted.get(name))
        return f"{name} {one}", other
    if isinstance(got, list) and isinstance(wanted, list):
        pairs = list(zip_longest(got, wanted, fillvalue="none"))
        return difference(*next(pair for pair in pairs if pair[0] != pair[1]))
    one, other = (value if isinstance(value, str) else json.dumps(value) for value in (got, wanted))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - 20)
    one, other = ("…" * (start > 0) + t[start : start + limit] + "…" * (len(t) > start + limit) for t in (one, other))
    return one or "none", other or "none"
