"""Validation of a run: every file against the manifests, or every value against the format of the store.

Runs of schema 3 list the SHA-256 of all files, so reading them once finds every change. Older runs have no manifests:
their values are checked against each other (sums against tokens, labels against tables), as are those of a newer run
with `recompute`.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from workbench.counting import count_of
from workbench.harmony.labels import CHANNELS, PARTS
from workbench.memory import raise_if_limited
from workbench.progress import progress
from workbench.runs import feature_examples, manifest, neuron_examples, shards
from workbench.runs.examples import of_tokens
from workbench.runs.expected_files import FLAG
from workbench.runs.group import open_group
from workbench.runs.reader import Run
from workbench.runs.schema import NEURON_FIELDS, STORED_AS, ArraySpec, Layout, Unit, arrays
from workbench.runs.storage import Storage, storage_at
from workbench.runs.summaries import summarise

_GATE_ROUNDING = 4e-3  # four float16 gates
_STATUSES = ("writing", "complete")
_Grains = Mapping[str, tuple[int, ...]]  # shape of the files of each array


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where."""

    where: str
    what: str


class _CheckedRun(Run):
    """A run of which a unit may not be committed though the run is complete: that is one of the problems."""

    @cached_property
    def committed(self) -> np.ndarray:
        return self._read_committed()


def verify(path: str | Path | Storage, *, workers: int | None = None, recompute: bool = False) -> list[Problem]:
    """Return everything that is damaged or does not agree, units checked side by side; [] for a valid run.

    recompute: check sums and ranges of values too, not only that every file is the one that was written.
    """
    try:
        storage = storage_at(path)
        run = _CheckedRun(storage, open_group(storage))
        layout, _ = run.layout, run.committed
        specs = arrays(run.model, run.spec, layout)
    except Exception as error:  # whatever damaged metadata or a damaged table makes zarr raise
        opened = f"cannot be opened as a run: {_first_line(error)}"
        return [Problem(str(path), error.what if isinstance(error, manifest.DamageError) else opened)]
    grains: dict[str, tuple[int, ...]] = {}
    problems = [*_structure(run, specs, grains), *_columns(run)]
    if problems:
        return problems
    there = run.storage.files()
    if run.manifest is not None:
        problems = _in_units(layout, workers, lambda unit: list(_listed(run, specs, grains, unit, there)))
        problems += [*_listed_elsewhere(run, there), *_status(run)]
        if problems or not recompute:
            return problems
    try:
        problems += _tables(run, layout)
        problems += _in_units(layout, workers, lambda unit: _checked(run, specs, grains, unit, layout, there))
    except Exception as error:  # a damaged table, where checks of units read it
        return [*problems, Problem(str(path), f"cannot be read: {_first_line(error)}")]
    problems += _status(run)
    if run.status == "complete" and not problems:
        problems += _totals(run)
    return problems


def other_content(run: Run) -> list[str]:
    """Return the groups and arrays that others added to a run, which no job writes and no reader of a run reads."""
    there = run.storage.files()
    own = {*arrays(run.model, run.spec, run.layout), "units/committed"}
    if run.manifest is None:  # a run before schema 3 does not state it the columns of its tables from those of others
        own |= {"/".join(key.split("/")[:2]) for key in there if key.startswith(("sequences/", "messages/"))}
    else:
        own |= set(manifest.read(run.storage, manifest.CREATED)[1])
    groups = {name.partition("/")[0] for name in own}
    unknown = set()
    for key in there:
        top, _, rest = key.partition("/")
        if top in ("manifest", "totals") or not rest or rest == "zarr.json":
            if rest and top not in (*groups, "manifest", "totals"):
                unknown.add(top)
            continue
        array = "/".join(key.split("/")[:2])
        if top not in groups:
            unknown.add(top)
        elif array not in own and f"{array}/zarr.json" not in own:
            unknown.add(array)
    return sorted(unknown)


def _in_units(layout: Layout, workers: int | None, check: Callable[[Unit], list[Problem]]) -> list[Problem]:
    """Return problems of all units, checked in threads."""
    problems: list[Problem] = []
    pool = ThreadPoolExecutor(workers or shards.threads(), thread_name_prefix="verify")
    try:
        with progress("verify", len(layout.units), "units") as advance:
            for unit_problems in pool.map(check, layout.units):
                problems += unit_problems
                advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return problems


def _listed(run: Run, specs: dict[str, ArraySpec], grains: _Grains, unit: Unit, there: set[str]) -> Iterator[Problem]:
    """Yield what is wrong with the files of a unit by its manifest."""
    where, key = f"unit {unit.index}", manifest.unit_key(unit.index)
    expected = set(files_of_unit(specs, grains, unit))
    if not run.committed[unit.index]:
        if key in there and expected <= there:
            yield Problem(where, "is not committed though all its files are there: the flag was cleared")
        return
    try:
        files = manifest.read(run.storage, key)[1]
    except manifest.DamageError as error:
        yield Problem(where, str(error))
        return
    flag = f"units/committed/c/{unit.index}"
    if flag not in there or (flag not in files and run.storage.read(flag) != FLAG):
        yield Problem(where, f"{flag} is not the flag of a committed unit")
    for missing in sorted(expected - set(files)):
        yield Problem(where, f"{missing} is not listed in {key}")
    yield from _changed(run, where, files, there)


def _changed(run: Run, where: str, files: Mapping[str, manifest.Entry], there: set[str]) -> Iterator[Problem]:
    """Yield files that are missing, or whose content is not what the manifest lists."""
    for key, entry in files.items():
        if key not in there:
            yield Problem(where, f"{key} is missing")
            continue
        try:
            data = run.storage.read(key, entry.size)
        except OSError as error:
            yield Problem(where, f"{key} cannot be read: {error.strerror or error}")
            continue
        if manifest.entry([data]) != entry:
            yield Problem(where, f"{key} was changed: its content is not what was written")


def _listed_elsewhere(run: Run, there: set[str]) -> Iterator[Problem]:
    """Yield what is wrong with tables, metadata and totals by their manifests."""
    for key in (manifest.CREATED, *([manifest.COMPLETE] if run.status == "complete" else [])):
        try:
            files = manifest.read(run.storage, key)[1]
        except manifest.DamageError as error:
            yield Problem("manifest", str(error))
            continue
        yield from _changed(run, "run", files, there)


def _totals(run: Run) -> Iterator[Problem]:
    """Yield totals of a finished run that are not the sums of what its units hold; runs of schema 1 have none."""
    if "totals" not in run.group:
        return
    summed = Run(run.storage, open_group(run.storage))
    summed.status = "writing"  # adds up instead of reading
    for name in run.summaries:
        try:
            same = np.allclose(run.total(name), summed.total(name), rtol=1e-9)
        except Exception as error:  # whatever a damaged chunk makes a codec raise
            yield Problem(f"totals/{name}", f"cannot be read: {_first_line(error)}")
            continue
        if not same:
            yield Problem(f"totals/{name}", "is not the sum of the units")


def _checked(
    run: Run, specs: dict[str, ArraySpec], grains: _Grains, unit: Unit, layout: Layout, there: set[str]
) -> list[Problem]:
    """Return what is wrong with a unit, the files of the run being `there`."""
    where = f"unit {unit.index}"
    missing = [key for key in files_of_unit(specs, grains, unit) if key not in there]
    if not run.committed[unit.index]:
        cleared = "is not committed though all its files are there: the flag was cleared"
        return [] if missing else [Problem(where, cleared)]
    if missing:
        return [Problem(where, f"{key} is missing") for key in missing]
    return [Problem(where, what) for what in _unit(run, specs, unit, layout)]


def _first_line(error: Exception) -> str:
    """Return the first line of an error that shows damage.

    Raises:
        MemoryError: it shows that the memory of this process is limited.
    """
    raise_if_limited(error)
    return (str(error) or type(error).__name__).splitlines()[0]


def _status(run: Run) -> Iterator[Problem]:
    done, total = run.progress
    if run.status not in _STATUSES:
        yield Problem("attributes", f"status is {run.status!r}, expected one of {_STATUSES}")
    if run.status == "complete" and done < total:
        yield Problem(
            "attributes", f"status is complete, but {total - done} of {count_of(total, 'unit')} are not committed"
        )


def _structure(run: Run, specs: dict[str, ArraySpec], grains: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
    """Arrays that are missing or not as the layout requires; the shape of the files of each is added to `grains`."""
    older = arrays(run.model, run.spec, run.layout, schema=3)  # dimensions of runs before schema 4
    for name, spec in specs.items():
        try:
            array = run.group[name]
        except KeyError:
            yield Problem(name, "the array is missing")
            continue
        except Exception as error:  # whatever damaged metadata makes zarr raise
            yield Problem(name, f"its zarr.json cannot be used: {_first_line(error)}")
            continue
        if not isinstance(array, zarr.Array):
            yield Problem(name, "is a group, expected an array")
            continue
        if reason := run.group.store.refusal(name):
            yield Problem(name, reason)
        grains[name] = array.shards or array.chunks
        if not spec.fits(array) and not older[name].fits(array):
            got = (array.shape, str(array.dtype), tuple(array.metadata.dimension_names or ()))
            yield Problem(
                name, f"has shape, dtype and dimensions {got}, expected {(spec.shape, spec.dtype, spec.dims)}"
            )


def _columns(run: Run) -> Iterator[Problem]:
    """Yield columns that a table lists and does not have as arrays."""
    for name in ("sequences", "messages"):
        try:
            table = run.group[name]
            arrays_of_table = set(table.array_keys())
            if run.manifest is None:
                run.array_names(name)  # refuses an array without metadata, which the table may not list
            missing = [str(column) for column in table.attrs.get("columns", []) if column not in arrays_of_table]
        except Exception as error:  # whatever damaged metadata makes zarr raise
            yield Problem(name, f"cannot be read: {_first_line(error)}")
            continue
        yield from (Problem(f"{name}/{column}", "is no array, which the table lists as a column") for column in missing)


def _tables(run: Run, layout: Layout) -> Iterator[Problem]:
    for name in ("sequences", "messages"):
        try:
            lengths = {column: array.shape[0] for column, array in run.group[name].arrays()}
            if len(set(lengths.values())) == 1:
                lengths = {column: len(array[:]) for column, array in run.group[name].arrays()}
        except Exception as error:  # whatever a damaged chunk makes a codec raise
            yield Problem(name, f"cannot be read: {_first_line(error)}")
            return
        if len(set(lengths.values())) > 1:
            yield Problem(name, f"columns of unequal length: {lengths}")
            return
    if len(set(run.group["sequences/id"][:])) < len(layout.lengths):
        yield Problem("sequences/id", "two sequences have one id")
    messages = run.group["messages"]
    sequence, start, end = (messages[c][:] for c in ("sequence", "start", "end"))
    inside = (sequence >= 0) & (sequence < len(layout.lengths))
    inside[inside] &= (start[inside] >= 0) & (end[inside] <= np.array(layout.lengths)[sequence[inside]])
    if not inside.all():
        yield Problem("messages", f"message {int(np.argmin(inside))} is not inside its sequence")


def files_of_unit(specs: dict[str, ArraySpec], grains: _Grains, unit: Unit) -> Iterator[str]:
    """Yield the keys of all shards that a unit owns."""
    for name, spec in specs.items():
        grain = grains[name]
        rows = _place(spec, unit)
        counts = [-(-n // g) for n, g in zip(spec.shape, grain, strict=True)]
        ranges = [range(c) for c in counts]
        ranges[spec.axis] = range(rows.start // grain[spec.axis], -(-rows.stop // grain[spec.axis]))
        for index in np.ndindex(*map(len, ranges)):
            yield "/".join((name, "c", *(str(r[i]) for r, i in zip(ranges, index, strict=True))))


def _place(spec: ArraySpec, unit: Unit) -> slice:
    """Return a unit's rows along the axis that units divide."""
    if "token" in spec.dims:
        return slice(unit.start, unit.start + unit.capacity)
    return slice(unit.index * spec.per_unit, (unit.index + 1) * spec.per_unit)


def _unit(run: Run, specs: dict[str, ArraySpec], unit: Unit, layout: Layout) -> Iterator[str]:
    """Yield what is wrong inside a committed unit."""
    values: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        own = _place(spec, unit)
        try:
            values[name] = shards.read(run.group[name], run.storage, name, own.start, own.stop, spec.axis)
        except Exception as error:  # whatever a damaged chunk makes a codec raise
            yield f"{name} cannot be read: {_first_line(error)}"
    if len(values) < len(specs):
        return
    lengths = [layout.lengths[s] for s in unit.sequences]
    used = sum(lengths)
    yield from _tokens(values, unit, lengths, used)
    records = {stored: values[name].take(range(used), specs[name].axis) for stored, name in _RECORDS if name in values}
    records |= {n: v[:, :used] for n, v in values.items() if n.startswith(("activations/", "records/"))}
    records |= {n: v[:used] for n, v in values.items() if n.startswith("selected/")}
    yield from _ranges(records)
    sequence, channel = values["tokens/sequence"][:used], values["tokens/channel"][:used]
    if channel.size and channel.max() >= len(CHANNELS):
        return
    again = summarise(records, sequence, channel, num_experts=run.model["num_experts"])
    for name, wanted in again.items():
        got = values[f"summaries/{name}"]
        got = got[0] if name in ("coactivation", "transition") else got[: len(unit.sequences)]
        if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=1e-5, atol=1e-5):
            yield f"summaries/{name} is not the sum of the tokens"
    if run.spec.examples:
        yield from _examples(run, values, records, used)
    if run.spec.neuron_layers:
        lists = {n: values[f"neurons/{n}"][0] for name in NEURON_FIELDS for n in (name, f"random_{name}")}
        tokens = {name: values[f"tokens/{name}"][:used] for name in ("sequence", "position", "channel")}
        yield from neuron_examples.problems(lists, tokens, records["experts"][list(run.spec.neuron_layers)])
    for one in run.spec.features:
        tokens = {name: values[f"tokens/{name}"][:used] for name in ("sequence", "position", "channel")}
        yield from feature_examples.problems(one, {n: v[0] for n, v in values.items() if n[:9] == "features/"}, tokens)
    rows = values["summaries/sequence"]
    if rows[: len(unit.sequences)].tolist() != list(unit.sequences) or (rows[len(unit.sequences) :] != -1).any():
        yield "summaries/sequence does not name the unit's sequences"


def _examples(run: Run, values: Mapping[str, np.ndarray], records: Mapping[str, Any], used: int) -> Iterator[str]:
    """Examples of a unit that are not those of its tokens."""
    tokens = {name: values[f"tokens/{name}"][:used] for name in ("sequence", "position", "channel")}
    again = of_tokens(records["experts"], records["gates"], tokens, num_experts=run.model["num_experts"])
    for name, wanted in again.items():
        if not np.array_equal(values[f"examples/{name}"][0], wanted):
            yield f"examples/{name} are not those of the tokens"


_RECORDS = tuple((name, STORED_AS[name]) for name in ("experts", "gates", "router_logits", "sink"))


def _tokens(values: dict[str, np.ndarray], unit: Unit, lengths: list[int], used: int) -> Iterator[str]:
    sequence, position = values["tokens/sequence"], values["tokens/position"]
    if not np.array_equal(sequence[:used], np.repeat(unit.sequences, lengths)):
        yield "tokens/sequence does not follow the sequence table"
    if not np.array_equal(position[:used], np.concatenate([np.arange(n) for n in lengths])):
        yield "tokens/position does not count each sequence from 0"
    if (sequence[used:] != -1).any():
        yield "a gap row is not marked as one"
    if values["tokens/part"].max(initial=0) >= len(PARTS) or values["tokens/channel"].max(initial=0) >= len(CHANNELS):
        yield "a part or channel code is unknown"
    if (values["tokens/id"][:used] < 0).any():
        yield "a token id is negative"


def _ranges(records: dict[str, Any]) -> Iterator[str]:
    if "experts" in records:
        experts, gates = np.sort(records["experts"], -1), records["gates"].astype(np.float64)
        if (experts[..., 1:] == experts[..., :-1]).any():
            yield "routing/experts: a token went twice to the same expert"
        if (np.abs(gates.sum(-1) - 1) > _GATE_ROUNDING).any():
            yield "routing/gates: gates that do not sum to 1"
        if (np.diff(gates, axis=-1) > 0).any():
            yield "routing/gates: gates that do not descend"
    if "sink" in records and not ((records["sink"] >= 0) & (records["sink"] <= 1)).all():
        yield "attention/sink: a value that is not a probability"
