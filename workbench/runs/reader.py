"""Reading a run: a lazy xarray view, the tables as pandas frames, and the summaries that studies resample.

Only committed units are visible, gaps never are, and opening costs the same whatever the run holds. A run that is
still being written is read like any other; open it again to see more.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.flags import read_flags
from workbench.harmony.labels import CHANNELS
from workbench.harmony.vocabulary import Tokenizer
from workbench.runs import conversations, shards, totals, views
from workbench.runs.manifest import (
    MAX_METADATA_BYTES,
    CheckedStore,
    DamageError,
    Manifest,
    attributes_digest,
    reading,
)
from workbench.runs.schema import MANIFESTS, SCHEMA, TOKEN_COLUMNS, ArraySpec, Layout, Spec, Unit, arrays
from workbench.runs.storage import ROOT, LocalStorage, Storage, place
from workbench.runs.summaries import expert_pairs, float32_of

_KEPT_BYTES = 256_000_000  # of a summary that is kept for the next question
_ATTRIBUTES = {
    "status": str,
    "model": dict,
    "checkpoint": dict,
    "spec": dict,
    "identity": dict,
    "provenance": dict,
    "unit_tokens": int,
}
_SIZES = ("n_layers", "num_experts", "experts_per_token", "n_heads")
_MAX_SIZE = 2**16


def open_run(
    path: str | Path | Storage, *, check: Literal["fast", "full"] = "fast", exclude: str | Sequence[str] = ()
) -> "Run":
    """Return the run at `path`. Every file is checked against the run's manifests before its first use.

    check: "fast" compares existence, size and the last bytes of a file; "full" its SHA-256.
    exclude: flags of sequences that are left out of everything that is read, as "irregular,truncated".

    Raises:
        InputError: there is no run, it has a newer schema, it is damaged (`DamageError`), or a flag is unknown.
    """
    where = place(path)
    run = Run(where, open_group(where, check=check))
    return run.excluding(exclude) if exclude else run


def open_group(where: Storage, mode: Literal["r", "r+"] = "r", check: Literal["fast", "full"] = "fast") -> zarr.Group:
    """Return the group of a run of this schema or of an older one.

    Raises:
        InputError: the path is missing, is not a run, or has a newer schema.
    """
    if not where.exists():
        raise InputError(f"{where} is not there: name the folder of a run")
    if isinstance(where, LocalStorage) and not where.path.is_dir():
        raise InputError(f"{where} is a file: name the folder of a run")
    try:
        store = CheckedStore(_store(where, read_only=mode == "r"))
        group = zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)
        schema = group.attrs["schema"]
        known = _are_known(group.attrs)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, KeyError, ValueError) as error:
        raise InputError(f"{where} is not a run: no Zarr group with a run's attributes is in it") from error
    except PermissionError as error:
        raise InputError(f"{where} cannot be opened: {error.strerror}") from error
    except (UnicodeDecodeError, TypeError, RecursionError, MemoryError) as error:
        raise DamageError(where, "its zarr.json cannot be read") from error
    if not isinstance(schema, int) or not known:
        raise InputError(f"{where} is a Zarr group, but not a run: it lacks a run's attributes")
    if schema > SCHEMA:
        raise InputError(f"{where} has schema {schema}, newer than this workbench's {SCHEMA}: update the workbench")
    if schema >= MANIFESTS:
        # zarr may wrap the store again, read-only: the manifest belongs to the store that it reads through
        group.store.manifest = Manifest(where, dict(group.attrs), full=check == "full")
        if group.attrs.get("digest") != attributes_digest(where.read(ROOT, MAX_METADATA_BYTES)):
            raise DamageError(where, "its attributes are not those that were written")
    return group


def _are_known(attributes: Mapping[str, Any]) -> bool:
    """Return whether a run's attributes are there, of their types, and its model has sizes that a model may have."""
    if not all(isinstance(attributes.get(name), kind) for name, kind in _ATTRIBUTES.items()):
        return False
    sizes = [attributes["model"].get(name) for name in _SIZES]
    return all(type(n) is int and 0 < n <= _MAX_SIZE for n in sizes)


def _store(where: Storage, *, read_only: bool) -> Any:
    store = where.store()
    return zarr.storage.LocalStore(store, read_only=read_only) if isinstance(store, str) else store


class Run:
    """What is committed of a run at the moment it was opened, without the sequences that are excluded by a flag."""

    def __init__(self, where: Storage, group: zarr.Group, excluded: tuple[str, ...] = ()) -> None:
        self.excluded = excluded  # flags of the sequences that are left out
        self.place = where
        self.group = group
        self.manifest: Manifest | None = group.store.manifest
        self.checked: shards.Readable = self.manifest or where  # reads whole files, checked where that is possible
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.status: str = self.attrs["status"]
        with reading(where, "its specification"):
            self.spec = Spec.from_json(self.attrs["spec"])
        self.model: Mapping[str, Any] = self.attrs["model"]
        self.checkpoint: Mapping[str, Any] = self.attrs["checkpoint"]
        self.provenance: Mapping[str, Any] = self.attrs["provenance"]

    def excluding(self, flags: str | Sequence[str]) -> "Run":
        """Return the run without the sequences that have one of these flags, as "irregular,truncated".

        Tables, tokens, summaries and totals are those of the other sequences. Sums that a capture keeps of the whole
        run alone are computed again from the tokens, or refused where no tokens are stored.

        Raises:
            InputError: a flag is unknown, the run stores no flags, or no sequence is left.
        """
        names = read_flags(flags if isinstance(flags, str) else ",".join(flags))
        with reading(self.place, "the table sequences"):
            has_flags = "flags" in self.group["sequences"]
        if names and not has_flags:
            raise InputError(f"{self.path} stores no flags of its sequences: capture it again to exclude some")
        run = Run(self.place, self.group, tuple(dict.fromkeys((*self.excluded, *names))))
        if run.excluded and not len(run._visible) and len(Run(self.place, self.group)._visible):
            raise InputError(f"{self.path}: excluding {', '.join(run.excluded)} leaves no sequence")
        return run

    @property
    def exclusion(self) -> str:
        """Return how many sequences are left out and for which flags, in words; "" if none are."""
        if not self.excluded:
            return ""
        left_out = len(self._committed_sequences) - len(self._visible)
        return f"{left_out:,} of {len(self._committed_sequences):,} sequences excluded ({', '.join(self.excluded)})"

    @property
    def path(self) -> str:
        """Return the path or URL with which the run was opened."""
        return str(self.place)

    def __repr__(self) -> str:
        done, total = self.progress
        return f"<Run {self.path}: {self.status}, {done} of {total} units, records {', '.join(self.recorded)}>"

    @property
    def recorded(self) -> list[str]:
        """Return the recorded quantities of every token, by the names that `--record` uses."""
        switches = [
            n
            for n in ("routing", "router_logits", "sinks", "sink_sums", "logprobs", "host_routing", "examples")
            if getattr(self.spec, n)
        ]
        switches += ["neurons"] if self.spec.neuron_layers else []
        return switches + [a.name for a in self.spec.selected]

    @cached_property
    def layout(self) -> Layout:
        """Return the position of every sequence's tokens in the store, committed or not."""
        with reading(self.place, "the layout"):
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
        return Layout(self.attrs["unit_tokens"], tuple(units), offsets, lengths)

    @cached_property
    def committed(self) -> np.ndarray:
        """Return whether each unit is committed [unit]."""
        with reading(self.place, "units/committed"):
            return np.asarray(self.group["units/committed"][:])

    @property
    def progress(self) -> tuple[int, int]:
        """Return units committed, and in all."""
        return int(self.committed.sum()), len(self.committed)

    @cached_property
    def digest(self) -> str:
        """Return a digest of what is visible: the run, its committed units, and their contents."""
        identity = json.dumps(self.attrs["identity"], sort_keys=True).encode()
        if self.manifest is not None:
            identity += "".join(self.manifest.digests(np.flatnonzero(self.committed).tolist())).encode()
        identity += " ".join(sorted(self.excluded)).encode()
        return hashlib.sha256(identity + np.packbits(self.committed).tobytes()).hexdigest()[:16]

    @cached_property
    def _committed_sequences(self) -> np.ndarray:
        """Numbers of the sequences whose unit is committed."""
        chosen = [s for unit in self._committed_units for s in unit.sequences]
        return np.array(chosen, dtype=np.int64)

    @property
    def _committed_units(self) -> list[Unit]:
        return [unit for unit, done in zip(self.layout.units, self.committed, strict=True) if done]

    @cached_property
    def _visible(self) -> np.ndarray:
        """Numbers of the sequences whose unit is committed and that are not excluded."""
        if not self.excluded:
            return self._committed_sequences
        with reading(self.place, "the flags of the sequences"):
            flags = [set(str(text).split()) for text in self.group["sequences/flags"][:]]
        unwanted = set(self.excluded)
        return np.array([s for s in self._committed_sequences if not flags[s] & unwanted], dtype=np.int64)

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """Return a row a sequence, indexed by its number; `task` and `domain` are those of its metadata.

        correct: 1, 0, or −1 where it is unknown. expected: the text that the final message should be ("" if unknown),
        of which `answer` is an older name.
        """
        with reading(self.place, "the table sequences"):
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
        """Return a row a message; positions count from the start of its sequence."""
        table = self._table("messages")
        return table[table["sequence"].isin(self._visible)]

    def _table(self, name: str) -> pd.DataFrame:
        with reading(self.place, f"the table {name}"):
            return self._read_table(name)

    def _read_table(self, name: str) -> pd.DataFrame:
        group = self.group[name]
        order = group.attrs.get("columns") or sorted(column for column, _ in group.arrays())
        arrays_of = {column: group[column] for column in order}
        if len({array.shape for array in arrays_of.values()}) > 1:
            raise ValueError("columns of unequal length")
        columns = {column: array[:] for column, array in arrays_of.items()}
        table = pd.DataFrame({c: v.astype(object) if v.dtype.kind == "T" else v for c, v in columns.items()})
        return table.rename_axis(name.removesuffix("s"))

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
        for rows in self._unit_spans:
            block = {}
            for name, path in wanted.items():
                with reading(self.place, path):
                    array = self._array(path)
                    axis = array.metadata.dimension_names.index("token")
                    grain = (array.shards or array.chunks)[axis]
                    end = -(-rows.stop // grain) * grain
                    values = shards.read(array, self.checked, path, rows.start, end, axis, layer if axis else None)
                values = values[(*(slice(None),) * axis, slice(rows.stop - rows.start))]
                block[name] = float32_of(values) if path.startswith("activations/") else values
                if name in sparse and block[name].dtype.kind == "f":  # tokens that were not recorded have no value
                    with reading(self.place, f"selected/{name}"):
                        there = np.asarray(self._array(f"selected/{name}")[rows])
                    block[name] = np.where(
                        there.reshape(1, -1, *(1,) * (values.ndim - 2)), block[name], np.float32(np.nan)
                    )
            if self.excluded:
                visible = np.isin(block["sequence"], self._visible)
                for name, path in wanted.items():
                    axis = self._array(path).metadata.dimension_names.index("token")
                    block[name] = np.compress(visible, block[name], axis)
            if len(block["sequence"]):
                yield block

    def _array(self, path: str) -> zarr.Array:
        """Return an array that units write, after a check that its shape and dtype are those of the run's layout."""
        array, spec = self.group[path], self._specs.get(path)
        if spec is None or (array.shape, str(array.dtype)) != (spec.shape, spec.dtype):
            raise DamageError(self.place, f"{path} has another shape or dtype than the run's layout")
        return array

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return arrays(self.model, self.spec, self.layout)

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Path in the store → name in the dataset, of all that tokens have."""
        columns = {*TOKEN_COLUMNS, "logprob", "entropy"}  # others add columns of their own
        with reading(self.place, "tokens"):
            there = [n for n, _ in self.group["tokens"].arrays()]
        names = {f"tokens/{n}": n for n in sorted(columns.intersection(there))}
        names |= {f"routing/{n}": n for n in ("experts", "gates")} if self.spec.routing else {}
        names |= {"routing/logits": "router_logits"} if self.spec.router_logits else {}
        if self.spec.host_routing:
            names |= {
                "routing/own_experts": "own_experts",
                "routing/margin": "router_margin",
                "routing/forced": "forced",
            }
        names |= {"attention/sink": "sink"} if self.spec.sinks else {}
        names |= {f"activations/{a.name}": a.name for a in self.spec.activations if a.per_token}
        return names | {f"records/{r.name}": r.name for r in self.spec.records if r.per_token}

    @cached_property
    def dataset(self) -> xr.Dataset:
        """Return every token of every visible sequence, lazily: nothing is read before it is computed.

        Dimensions layer, token, slot, expert, head; the token's columns (sequence, position, channel, …) beside.
        """
        with reading(self.place, "the tokens"):
            return self._dataset(self.spans)

    def sequence(self, which: int | str) -> xr.Dataset:
        """Return the tokens of one sequence, by number or id; reads its own chunks only."""
        row: Any = self.sequences.loc[self._number(which)]
        offset = int(row["offset"])
        with reading(self.place, f"sequence {which!r}"):
            return self._dataset([slice(offset, offset + int(row["length"]))])

    def text(self, which: int | str, *, tokenizer: Tokenizer | None = None, channel: str | None = None) -> str:
        """Return the text of a sequence, by number or id: with its marks, or only the contents of one channel.

        Raises:
            InputError: there is no such sequence, or its tokenizer is not installed and not given.
        """
        known = conversations.tokenizer(self, tokenizer)
        if channel is None:
            return conversations.text(self.sequence(which)["id"].values, known)
        said = conversations.conversation(self, self._number(which), known)
        names = sorted({m["channel"] for m in said if m["channel"]})
        if channel not in names:
            raise InputError(f"sequence {which!r} has no channel {channel!r}: it has {', '.join(names) or 'none'}")
        return "\n".join(m["text"] for m in said if m["channel"] == channel)

    def conversation(self, which: int | str, *, tokenizer: Tokenizer | None = None) -> list[dict[str, Any]]:
        """Return the messages of a sequence, by number or id: role, channel, text, closed_by, text_span and the rest.

        `text_span` are the positions of the text in the sequence, as in `run.sequence(which).isel(token=span)`.

        Raises:
            InputError: there is no such sequence, or its tokenizer is not installed and not given.
        """
        return conversations.conversation(self, self._number(which), conversations.tokenizer(self, tokenizer))

    def select(self, **labels: str | Sequence[str]) -> xr.Dataset:
        """Return the tokens with these labels: channel, role, part, effort, task, domain or sequence id, by name.

        Several names of a label are alternatives: `run.select(channel=["analysis", "final"], effort="high")`. Labels
        are in memory, the recorded quantities lazy.

        Raises:
            InputError: a label or a name is unknown.
        """
        found = self.dataset.isel(token=np.flatnonzero(views.chosen(self, labels)))
        return found.assign_coords({name: found[name].compute() for name in found.coords})  # to group by

    def _number(self, which: int | str) -> int:
        """Return the number of a sequence that is named by number or id."""
        table = self.sequences
        found = table.index[table["id"] == which] if isinstance(which, str) else table.index[table.index == which]
        if not len(found):
            first = ", ".join(map(repr, table["id"][:3]))
            raise InputError(f"sequence {which!r} is not in {self.path}; it holds {len(table)}, the first {first}")
        return int(found[0])

    def __getattr__(self, name: str) -> Any:
        """Raise an error that says where something is that has another name here."""
        instead = _INSTEAD.get(name)
        raise AttributeError(f"a run has no {name!r}" + (f": use {instead}" if instead else ""))

    def _dataset(self, spans: list[slice]) -> xr.Dataset:
        selected = {a.name: a for a in self.spec.selected}
        sparse = {a.name: _rows(self._array(f"selected/{a.name}"), 0, spans) for a in self.spec.selected if a.sparse}
        variables: dict[str, Any] = {}
        for stored, name in self._stored.items():
            array = self._array(stored)
            dims = tuple(array.metadata.dimension_names)
            lazy = _rows(array, dims.index("token"), spans)
            if name in selected:
                variables[name] = views.recorded(lazy, selected[name], self.model, sparse.get(name))
            else:
                variables[name] = (dims, lazy, views.flags(name))
        coords = views.coordinates(variables, self.model)
        labels = {name: variables.pop(name) for name in views.LABELS if name in variables}
        coords |= labels | views.names(labels, self.sequences)
        origin: dict[str, Any] = {"run": self.path, "digest": self.digest, "channels": list(CHANNELS)}
        return xr.Dataset(variables, coords=coords, attrs=origin)

    @cached_property
    def summaries(self) -> list[str]:
        """Return names of the sums that `summary` and `total` give."""
        with reading(self.place, "summaries"):
            known = {n.removeprefix("summaries/") for n in self._specs}
            there = (n for n, _ in self.group["summaries"].arrays())
            return sorted(n for n in there if n in known and n != "sequence")

    def summary(self, name: str) -> xr.DataArray:
        """Return a sum per sequence and channel (`tokens`, `expert_count`, `sink_sum`, …) with labels of each sequence.

        `coactivation` and `transition` are summed over the visible run, per channel.
        """
        with reading(self.place, f"summary {name!r}"):
            return self._read_summary(name)

    def _read_summary(self, name: str) -> xr.DataArray:
        if name in self._kept:
            return self._kept[name]
        array = self._summary(name)
        if _over_the_run(name):
            return self.total(name)
        dims, coords = self._axes(array)
        rows = np.flatnonzero(np.isin(self.group["summaries/sequence"][:], self._visible))
        table = self.sequences
        coords |= {"sequence": table.index.to_numpy()}
        coords |= {c: ("sequence", table[c].to_numpy(dtype=object)) for c in ("id", "prompt_id", "effort", "task")}
        found = xr.DataArray(self._whole(array)[rows], dims=("sequence", *dims), coords=coords, name=name)
        if found.nbytes <= _KEPT_BYTES:
            self._kept[name] = found
        return found

    def _whole(self, array: zarr.Array) -> np.ndarray:
        """All rows of a summary; those of units that are not committed are the fill value."""
        out = np.full(array.shape, array.fill_value, dtype=array.dtype)
        rows = self.layout.unit_sequences
        name = str(array.path)
        units = np.flatnonzero(self.committed)

        def read(unit: int) -> None:
            out[unit * rows : (unit + 1) * rows] = shards.read(
                array, self.checked, name, unit * rows, (unit + 1) * rows, 0
            )

        with ThreadPoolExecutor(shards.threads()) as pool:
            list(pool.map(read, units.tolist()))
        return out

    @cached_property
    def _kept(self) -> dict[str, xr.DataArray]:
        """Summaries that were asked for once, if they are small."""
        return {}

    @cached_property
    def _totals(self) -> dict[str, xr.DataArray]:
        """Totals that were asked for once, if they are small."""
        return {}

    @property
    def groups(self) -> pd.DataFrame:
        """Return the effort and task of every group of `total`."""
        return self._groups[0]

    def total(self, name: str) -> xr.DataArray:
        """Return a summary added up over the sequences of each effort and task, dimension `group`.

        `coactivation`, `transition` and sketches are of the whole run. Ready in a finished run; summed in an
        unfinished one.
        """
        with reading(self.place, f"total {name!r}"):
            return self._read_total(name)

    def _read_total(self, name: str) -> xr.DataArray:
        if name in self._totals:
            return self._totals[name]
        array = self._summary(name)
        dims, coords = self._axes(array)
        if not _over_the_run(name):
            dims = ("group", *dims)
            coords |= {c: ("group", self.groups[c].to_numpy(dtype=object)) for c in ("effort", "task")}
        if self.excluded and _over_the_run(name):
            return self._total_over_the_run(name, dims, coords)
        if self.status == "complete" and "totals" in self.group and not self.excluded:
            ready = xr.DataArray(self.group[f"totals/{name}"][:], dims=dims, coords=coords, name=name)
            if ready.nbytes <= _KEPT_BYTES:
                self._totals[name] = ready
            return ready
        found, which = self._groups
        of_sequence = np.full(len(self.layout.lengths), totals.NO_GROUP)
        of_sequence[self._visible] = which
        values = totals.total(array, name, self._committed_units, of_sequence, len(found), self.layout.unit_sequences)
        return xr.DataArray(values, dims=dims, coords=coords, name=name)

    def _total_over_the_run(self, name: str, dims: tuple[str, ...], coords: dict[str, Any]) -> xr.DataArray:
        """A sum that is stored of the whole run alone, computed from the tokens of the sequences that are left."""
        if name not in totals.PER_UNIT:
            raise InputError(
                f"{name} of {self.path} was summed during capture and cannot be computed without excluded sequences: "
                "capture with --exclude"
            )
        shape = self._summary(name).shape[1:]
        values = np.zeros(shape, dtype=np.int64)
        for block in self.blocks("experts"):
            experts = block["experts"].astype(np.int64)
            following = experts if name == "coactivation" else experts[1:]
            values += expert_pairs(experts[: len(following)], following, block["channel"], shape[-1])
        self._totals[name] = xr.DataArray(values, dims=dims, coords=coords, name=name)
        return self._totals[name]

    @cached_property
    def _groups(self) -> tuple[pd.DataFrame, np.ndarray]:
        return totals.groups(self.sequences)

    def _summary(self, name: str) -> zarr.Array:
        if name not in self.summaries:
            raise InputError(f"summary {name!r} is not in {self.path}; it holds {', '.join(self.summaries)}")
        return self._array(f"summaries/{name}")

    def _axes(self, array: zarr.Array) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Dimensions of a summary behind the first, and their coordinates."""
        dims = tuple(array.metadata.dimension_names)[1:]
        coords: dict[str, Any] = {"channel": list(CHANNELS)}
        coords |= {"layer": np.arange(self.model["n_layers"])} if "layer" in dims else {}
        name = str(array.path).rpartition("/")[2]
        found = [a for a in self.spec.selected if name.startswith(f"{a.name}_")]
        if not found or len(dims) < 2:
            return dims, coords
        recorded = max(found, key=lambda a: len(a.name))
        return (dims[0], "layer", *views.summary_dims(recorded, dims[2:])), coords | {
            "layer": np.array(recorded.layers)
        }


# what users of other tools look for
_INSTEAD = {
    "top_experts": "wb.top_experts(run)",
    "probe": "wb.probe(run, labels)",
    "direction": "wb.direction(run, hook, layer, a=…, b=…)",
    "accuracy": "wb.accuracy(run)",
    "tokens": "run.dataset",
    "experts": "run.dataset['experts']",
    "gates": "run.dataset['gates']",
    "router_logits": "run.dataset['router_logits'], if it was recorded",
    "sinks": "run.dataset['sink']",
    "sink": "run.dataset['sink']",
    "activations": "run.dataset[hook], as run.dataset['hook_resid_post']",
    "transcripts": "run.conversation(id)",
    "conversations": "run.conversation(id)",
    "data": "run.dataset",
    "load": "wb.studies.routing.load(run)",
    "texts": "run.text(sequence)",
    "decode": "run.text(sequence)",
    "sel": "run.select(channel=…, effort=…, task=…)",
}


def _over_the_run(name: str) -> bool:
    return name in totals.PER_UNIT or name.endswith("_sketch")


def _rows(array: zarr.Array, axis: int, spans: list[slice]) -> da.Array:
    """The rows of these spans as one lazy array, a span a block along `axis`."""
    whole = da.from_zarr(array, chunks=array.shards or array.chunks)
    place = [slice(None)] * array.ndim
    parts = [whole[(*place[:axis], span)] for span in spans]
    return da.concatenate(parts, axis) if parts else whole[(*place[:axis], slice(0))]
