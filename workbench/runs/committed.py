"""What is committed of a run: its units, layout, tables, and the stored arrays block by block."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd
import zarr

from workbench.bounded_json import parse_json
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.runs import shards
from workbench.runs.manifest import DamageError, Manifest, reading
from workbench.runs.schema import MANIFESTS, STORED_AS, TOKEN_COLUMNS, ArraySpec, Layout, Spec, Unit, arrays
from workbench.runs.storage import Storage
from workbench.runs.summaries import float32_of


class CommittedRun:
    """The committed units of a run at the moment it was opened, without the sequences that a flag excludes."""

    def __init__(self, storage: Storage, group: zarr.Group, excluded: tuple[str, ...] = ()) -> None:
        self.excluded = excluded  # flags of the sequences that are left out
        self.storage = storage
        self.group = group
        self.manifest: Manifest | None = group.store.manifest
        self.checked: shards.Readable = self.manifest or storage  # reads whole files, checked where that is possible
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.status: str = self.attrs["status"]
        with reading(storage, "its specification"):
            self.spec = Spec.from_json(self.attrs["spec"])
        self.model: Mapping[str, Any] = self.attrs["model"]
        self.checkpoint: Mapping[str, Any] = self.attrs["checkpoint"]
        self.provenance: Mapping[str, Any] = self.attrs["provenance"]

    @property
    def path(self) -> str:
        """Return the path or URL with which the run was opened."""
        return str(self.storage)

    @property
    def recorded(self) -> list[str]:
        """Return the recorded quantities of every token, by the names that `--record` uses."""
        switches = [
            n
            for n in ("routing", "router_logits", "sinks", "sink_sums", "logprobs", "host_routing", "examples")
            if getattr(self.spec, n)
        ]
        switches += ["neurons"] if self.spec.neuron_layers else []
        switches += ["features"] if self.spec.features else []
        return switches + [a.name for a in self.spec.selected]

    @cached_property
    def layout(self) -> Layout:
        """Return the position of every sequence's tokens in the store, committed or not."""
        with reading(self.storage, "the layout"):
            return self._read_layout()

    def _read_layout(self) -> Layout:
        attrs = self.group["units/committed"].attrs
        units, first = [], 0
        for index, (start, capacity, n) in enumerate(
            zip(attrs["starts"], attrs["capacities"], attrs["sequences"], strict=True)
        ):
            units.append(Unit(index, start, capacity, tuple(range(first, first + n))))
            first += n
        offsets, lengths = (tuple(self.group[f"sequences/{c}"][:].tolist()) for c in ("offset", "length"))
        layout = Layout(self.attrs["unit_tokens"], tuple(units), offsets, lengths)
        if not layout.is_consistent():
            raise DamageError(self.storage, "offsets and lengths of the table sequences do not follow its units")
        return layout

    @cached_property
    def committed(self) -> np.ndarray:
        """Return whether each unit is committed [unit].

        Raises:
            DamageError: the run is complete, and a unit is not committed.
        """
        committed = self._read_committed()
        if self.status == "complete" and not committed.all():
            missing = f"{int((~committed).sum())} of {count_of(len(committed), 'unit')}"
            raise DamageError(self.storage, f"status is complete, but {missing} are not committed")
        return committed

    def _read_committed(self) -> np.ndarray:
        with reading(self.storage, "units/committed"):
            return np.asarray(self.group["units/committed"][:])

    @property
    def progress(self) -> tuple[int, int]:
        """Return units committed, and in all."""
        return int(self.committed.sum()), len(self.committed)

    @cached_property
    def digest(self) -> str:
        """Return a digest of what is visible: the run, its committed units, and their contents.

        A run of schema 1 or 2 has the digest that it had before checksums were added to it, which change no value:
        results name the run by it. `content_digest` covers the contents of such a run too.
        """
        return self._digest(with_contents=self.attrs["schema"] >= MANIFESTS)

    @cached_property
    def content_digest(self) -> str:
        """Return a digest of what is visible, with its contents wherever the run has checksums: the key of caches."""
        return self._digest(with_contents=self.manifest is not None)

    def _digest(self, *, with_contents: bool) -> str:
        identity = json.dumps(self.attrs["identity"], sort_keys=True).encode()
        if with_contents and self.manifest is not None:
            identity += "".join(self.manifest.digests(np.flatnonzero(self.committed).tolist())).encode()
        identity += " ".join(sorted(self.excluded)).encode()
        return hashlib.sha256(identity + np.packbits(self.committed).tobytes()).hexdigest()[:16]

    @cached_property
    def _committed_sequences(self) -> np.ndarray:
        """Return numbers of the sequences whose unit is committed."""
        chosen = [s for unit in self._committed_units for s in unit.sequences]
        return np.array(chosen, dtype=np.int64)

    @property
    def _committed_units(self) -> list[Unit]:
        return [unit for unit, done in zip(self.layout.units, self.committed, strict=True) if done]

    @cached_property
    def _visible(self) -> np.ndarray:
        """Return numbers of the sequences whose unit is committed and that are not excluded."""
        if not self.excluded:
            return self._committed_sequences
        with reading(self.storage, "the flags of the sequences"):
            flags = [set(str(text).split()) for text in self.group["sequences/flags"][:]]
        unwanted = set(self.excluded)
        return np.array([s for s in self._committed_sequences if not flags[s] & unwanted], dtype=np.int64)

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """Return one row for each sequence, indexed by its number; `task` and `domain` are those of its metadata.

        correct: 1, 0, or −1 where it is unknown. expected: the text that the final message should be ("" if unknown),
        of which `answer` is an older name.
        """
        with reading(self.storage, "the table sequences"):
            return self._read_sequences()

    def _read_sequences(self) -> pd.DataFrame:
        table = self._table("sequences").iloc[self._visible]
        if "answer" in table:
            table = table.assign(expected=table["answer"])
        missing = [name for name in ("task", "domain") if name not in table]  # runs before November 2026
        if not missing:
            return table
        meta = table["meta"].map(parse_json)
        return table.assign(**{k: meta.map(lambda m, k=k: str(m.get(k, ""))) for k in missing})

    @cached_property
    def messages(self) -> pd.DataFrame:
        """Return one row for each message; positions count from the start of its sequence."""
        table = self._table("messages")
        return table[table["sequence"].isin(self._visible)]

    def _table(self, name: str) -> pd.DataFrame:
        with reading(self.storage, f"the table {name}"):
            return self._read_table(name)

    def _read_table(self, name: str) -> pd.DataFrame:
        group = self.group[name]
        order = group.attrs.get("columns") or sorted(self.array_names(name))
        arrays_of = {column: group[column] for column in order}
        if len({array.shape for array in arrays_of.values()}) > 1:
            raise ValueError("columns of unequal length")
        columns = {column: array[:] for column, array in arrays_of.items()}
        table = pd.DataFrame({c: v.astype(object) if v.dtype.kind == "T" else v for c, v in columns.items()})
        return table.rename_axis(name.removesuffix("s"))

    def array_names(self, group: str) -> list[str]:
        """Return the names of the arrays of a group: those created, or, of a run without manifests, those there.

        Raises:
            DamageError: the metadata of an array is missing.
        """
        if self.manifest is not None:
            return self.manifest.arrays_of(group)
        members = {name for name, _ in self.group[group].members()}
        if lost := sorted(self.group.store.folders(group) - members):
            raise DamageError(self.storage, f"{group}/{lost[0]}/zarr.json is missing")
        return [name for name, _ in self.group[group].arrays()]

    @cached_property
    def spans(self) -> list[slice]:
        """Return token rows of the visible sequences, in order: committed units, in pieces where some are excluded."""
        if not self.excluded:
            return self._unit_spans
        offsets, lengths = self.layout.offsets, self.layout.lengths
        spans: list[slice] = []
        for s in self._visible.tolist():
            start, stop = offsets[s], offsets[s] + lengths[s]
            if spans and spans[-1].stop == start:
                spans[-1] = slice(spans[-1].start, stop)
            else:
                spans.append(slice(start, stop))
        return spans

    @property
    def _unit_spans(self) -> list[slice]:
        """Token rows in use of every committed unit."""
        lengths = self.layout.lengths
        return [
            slice(unit.start, unit.start + sum(lengths[s] for s in unit.sequences)) for unit in self._committed_units
        ]

    def blocks(self, *names: str, layer: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield committed units in order: `sequence`, `position`, `channel` of each token, and the named arrays.

        names: as in `dataset`; `token` is the last axis but that of the features, [layer, token, slot]. Memory is
        that of a unit. layer: read this one alone (a recorded activation counts its own), as [1, token, …].

        Raises:
            InputError: the run did not record a quantity.
        """
        stored = self._stored
        if unknown := sorted(set(names) - set(stored.values())):
            raise InputError(f"{unknown[0]!r} is not in {self.path}; it recorded {', '.join(self.recorded)}")
        wanted = {name: path for path, name in stored.items() if name in {"sequence", "position", "channel", *names}}
        sparse = {a.name for a in self.spec.selected if a.sparse}
        # opened once: to open an array takes longer than to read a unit of it
        opened = cache(self._array)
        for rows in self._unit_spans:
            block = {}
            for name, path in wanted.items():
                with reading(self.storage, path):
                    array = opened(path)
                    axis = array.metadata.dimension_names.index("token")
                    grain = (array.shards or array.chunks)[axis]
                    end = -(-rows.stop // grain) * grain
                    values = shards.read(array, self.checked, path, rows.start, end, axis, layer if axis else None)
                values = values[(*(slice(None),) * axis, slice(rows.stop - rows.start))]
                block[name] = float32_of(values) if path.startswith("activations/") else values
                if name in sparse and block[name].dtype.kind == "f":  # tokens that were not recorded have no value
                    with reading(self.storage, f"selected/{name}"):
                        there = np.asarray(opened(f"selected/{name}")[rows])
                    block[name] = np.where(
                        there.reshape(1, -1, *(1,) * (values.ndim - 2)), block[name], np.float32(np.nan)
                    )
            if self.excluded:
                visible = np.isin(block["sequence"], self._visible)
                for name, path in wanted.items():
                    axis = opened(path).metadata.dimension_names.index("token")
                    block[name] = np.compress(visible, block[name], axis)
            if len(block["sequence"]):
                yield block

    def _array(self, path: str) -> zarr.Array:
        """Return an array that units write, after a check that its shape, dtype and dimensions are of the layout."""
        array = self.group[path]
        if reason := self.group.store.refusal(path):
            raise DamageError(self.storage, f"{path} {reason}")
        if not any(path in specs and specs[path].fits(array) for specs in (self._specs, self._older_specs)):
            raise DamageError(self.storage, f"{path} has another shape, dtype or dimensions than the run's layout")
        return array

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return arrays(self.model, self.spec, self.layout)

    @cached_property
    def _older_specs(self) -> dict[str, ArraySpec]:
        return arrays(self.model, self.spec, self.layout, schema=3)  # dimensions of runs before schema 4

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Path in the store → name in the dataset, of all that tokens have."""
        columns = {*TOKEN_COLUMNS, "logprob", "entropy"}  # others add columns of their own
        with reading(self.storage, "tokens"):
            there = self.array_names("tokens")
        if missing := sorted(set(TOKEN_COLUMNS).difference(there)):
            raise DamageError(self.storage, f"tokens/{missing[0]} is missing")
        names = {f"tokens/{n}": n for n in sorted(columns.intersection(there))}
        recorded = {
            ("experts", "gates"): self.spec.routing,
            ("router_logits",): self.spec.router_logits,
            ("own_experts", "router_margin", "forced"): self.spec.host_routing,
            ("sink",): self.spec.sinks,
        }
        names |= {STORED_AS[n]: n for some, is_there in recorded.items() if is_there for n in some}
        names |= {f"activations/{a.name}": a.name for a in self.spec.activations if a.per_token}
        return names | {f"records/{r.name}": r.name for r in self.spec.records if r.per_token}
