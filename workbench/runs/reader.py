"""Reading a run: a lazy xarray view, the tables as pandas frames, and the summaries that studies resample.

Only committed units are visible, gaps never are, and opening costs the same whatever the run holds. A run that is
still being written is read like any other; open it again to see more.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.flags import read_flags
from workbench.harmony.labels import CHANNELS
from workbench.harmony.vocabulary import Tokenizer
from workbench.runs import conversations, views
from workbench.runs.group import open_group
from workbench.runs.manifest import reading
from workbench.runs.storage import Storage, storage_at
from workbench.runs.summed import SummedRun
from workbench.runs.token_rows import chosen_bounds, span_bounds, token_rows


class NoChecksumsWarning(UserWarning):
    """A run without checksums was opened: a file that was changed may be read as wrong values."""


_noted: set[str] = set()  # runs of which this process stated that they have no checksums


def open_run(
    path: str | Path | Storage, *, check: Literal["fast", "full"] = "fast", exclude: str | Sequence[str] = ()
) -> "Run":
    """Return the run at `path`. Every file is checked against the run's manifests before its first use.

    A run of schema 1 or 2 without manifests is read with a `NoChecksumsWarning`, once in a process.

    check: "fast" compares existence, size and the last bytes of a file; "full" its SHA-256.
    exclude: flags of sequences that are left out of everything that is read, as "irregular,truncated".

    Raises:
        InputError: there is no run, it has a newer schema, it is damaged (`DamageError`), or a flag is unknown.
    """
    storage = storage_at(path)
    run = Run(storage, open_group(storage, check=check))
    if run.manifest is None and run.path not in _noted:
        _noted.add(run.path)
        warnings.warn(
            f"{run.path} has no checksums (schema {run.attrs['schema']}): a changed file may be read as wrong values; "
            f"add them with `workbench verify {run.path} --add-checksums`",
            NoChecksumsWarning,
            stacklevel=2,
        )
    return run.excluding(exclude) if exclude else run


class Run(SummedRun):
    """What is committed of a run at the moment it was opened, without the sequences that are excluded by a flag."""

    def excluding(self, flags: str | Sequence[str]) -> "Run":
        """Return the run without the sequences that have one of these flags, as "irregular,truncated".

        Tables, tokens, summaries and totals are those of the other sequences. Sums that a capture keeps of the whole
        run alone are computed again from the tokens, or refused where no tokens are stored.

        Raises:
            InputError: a flag is unknown, the run stores no flags, or no sequence is left.
        """
        names = read_flags(flags if isinstance(flags, str) else ",".join(flags))
        with reading(self.storage, "the table sequences"):
            has_flags = "flags" in self.group["sequences"]
        if names and not has_flags:
            raise InputError(
                f"{self.path} stores no flags of its sequences: capture it again to be able to exclude sequences"
            )
        run = Run(self.storage, self.group, tuple(dict.fromkeys((*self.excluded, *names))))
        if run.excluded and not len(run._visible) and len(Run(self.storage, self.group)._visible):
            raise InputError(f"{self.path}: excluding {', '.join(run.excluded)} leaves no sequence")
        return run

    @property
    def exclusion(self) -> str:
        """Return how many sequences are left out and for which flags, in words; "" if none are."""
        if not self.excluded:
            return ""
        left_out = len(self._committed_sequences) - len(self._visible)
        return (
            f"{left_out:,} of {count_of(len(self._committed_sequences), 'sequence')} excluded "
            f"({', '.join(self.excluded)})"
        )

    def __repr__(self) -> str:
        done, total = self.progress
        return (
            f"<Run {self.path}: {self.status}, {done} of {count_of(total, 'unit')}, records {', '.join(self.recorded)}>"
        )

    @cached_property
    def dataset(self) -> xr.Dataset:
        """Return every token of every visible sequence, lazily: nothing is read before it is computed.

        Dimensions layer, token, slot, expert, head; the token's columns (sequence, position, channel, …) beside. Values
        stored as float16 or bfloat16 are float32. Labels are lazy too: to group by one of them, use `run.select()`,
        whose labels are in memory.
        """
        with reading(self.storage, "the tokens"):
            return self._dataset(span_bounds(self.spans))

    def sequence(self, which: int | str) -> xr.Dataset:
        """Return the tokens of one sequence, by number or id; reads its own chunks only."""
        row: Any = self.sequences.loc[self._number(which)]
        offset = int(row["offset"])
        with reading(self.storage, f"sequence {which!r}"):
            return self._dataset(span_bounds([slice(offset, offset + int(row["length"]))]))

    def text(self, which: int | str, *, tokenizer: Tokenizer | None = None, channel: str | None = None) -> str:
        """Return the text of a sequence, by number or id: with its marks, or only the contents of one channel.

        Raises:
            InputError: there is no such sequence, or its tokenizer is not installed and not given.
        """
        known = conversations.tokenizer(self, tokenizer)
        if channel is None:
            return conversations.text(self.sequence(which)["id"].values, known)
        messages = conversations.conversation(self, self._number(which), known)
        names = sorted({m["channel"] for m in messages if m["channel"]})
        if channel not in names:
            raise InputError(f"sequence {which!r} has no channel {channel!r}: it has {', '.join(names) or 'none'}")
        return "\n".join(m["text"] for m in messages if m["channel"] == channel)

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
        rows = np.flatnonzero(views.chosen(self, labels))
        with reading(self.storage, "the tokens"):
            selected = self._dataset(chosen_bounds(span_bounds(self.spans), rows))
        return selected.assign_coords({name: selected[name].compute() for name in selected.coords})  # to group by

    def __getitem__(self, name: str) -> xr.DataArray:
        """Return a quantity of the dataset, as in `run["sink"]`.

        Raises:
            InputError: the run has no quantity of this name.
        """
        if name not in self.dataset:
            raise InputError(f"{name!r} is not in {self.path}: it has {', '.join(map(str, self.dataset))}")
        return self.dataset[name]

    def _number(self, which: int | str) -> int:
        """Return the number of a sequence that is named by number or id."""
        table = self.sequences
        rows = table.index[table["id"] == which] if isinstance(which, str) else table.index[table.index == which]
        if not len(rows):
            first = ", ".join(map(repr, table["id"][:3]))
            raise InputError(f"sequence {which!r} is not in {self.path}; it holds {len(table)}, the first {first}")
        return int(rows[0])

    def __getattr__(self, name: str) -> Any:
        """Raise an error that states the name under which a run has the quantity."""
        instead = _INSTEAD.get(name)
        raise AttributeError(f"a run has no {name!r}" + (f": use {instead}" if instead else ""))

    def _dataset(self, bounds: np.ndarray) -> xr.Dataset:
        """Return the tokens between these bounds [span, 2]."""
        selected = {a.name: a for a in self.spec.selected}
        sparse = {
            a.name: token_rows(self._array(f"selected/{a.name}"), 0, bounds) for a in self.spec.selected if a.sparse
        }
        variables: dict[str, Any] = {}
        for stored, name in self._stored.items():
            array = self._array(stored)
            dims = tuple(array.metadata.dimension_names)
            lazy = token_rows(array, dims.index("token"), bounds)
            if name in selected:
                variables[name] = views.recorded(lazy, selected[name], self.model, sparse.get(name))
            else:
                variables[name] = (dims, *views.in_float32(lazy, views.labels_of(name) | views.flags(name)))
        coords = views.coordinates(variables, self.model)
        labels = {name: variables.pop(name) for name in views.LABELS if name in variables}
        coords |= labels | views.names(labels, self.sequences)
        origin: dict[str, Any] = {"run": self.path, "digest": self.digest, "channels": " ".join(CHANNELS)}
        return xr.Dataset(variables, coords=coords, attrs=origin)


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
    "isel": "run.dataset.isel(…)",
    "dims": "run.dataset.dims",
    "sizes": "run.dataset.sizes",
    "coords": "run.dataset.coords",
    "variables": "run.dataset.variables",
    "data_vars": "run.dataset.data_vars",
    "to_dataframe": "run.sequences, run.messages, or run.select(…)[quantity].to_dataframe()",
    "groupby": "run.select()[quantity].groupby('effort')",
    "plot": "run.select()[quantity], wb.figures, or `workbench dashboard`",
    "info": "run.dataset or `workbench summary`",
}
