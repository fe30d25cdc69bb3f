"""Sums that a capture keeps beside the tokens: of each sequence and channel, and added up over effort and task."""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.runs import shards, totals, views
from workbench.runs.committed import CommittedRun
from workbench.runs.manifest import reading
from workbench.runs.summaries import expert_pairs

_KEPT_BYTES = 256_000_000  # of a summary that is kept for the next question


class SummedRun(CommittedRun):
    """A run with its summaries and totals."""

    @cached_property
    def summaries(self) -> list[str]:
        """Return names of the sums that `summary` and `total` give."""
        with reading(self.storage, "summaries"):
            known = {n.removeprefix("summaries/") for n in self._specs}
            return sorted(n for n in self.array_names("summaries") if n in known and n != "sequence")

    def summary(self, name: str) -> xr.DataArray:
        """Return a sum per sequence and channel (`tokens`, `expert_count`, `sink_sum`, …) with labels of each sequence.

        `coactivation` and `transition` are summed over the visible run, per channel.
        """
        with reading(self.storage, f"summary {name!r}"):
            return self._read_summary(name)

    def _read_summary(self, name: str) -> xr.DataArray:
        if name in self._cache:
            return self._cache[name]
        array = self._summary(name)
        if _over_the_run(name):
            return self.total(name)
        dims, coords = self._axes(array)
        rows = np.flatnonzero(np.isin(self.group["summaries/sequence"][:], self._visible))
        table = self.sequences
        coords |= {"sequence": table.index.to_numpy()}
        coords |= {c: ("sequence", table[c].to_numpy(dtype=object)) for c in ("id", "prompt_id", "effort", "task")}
        summary = xr.DataArray(self._read_array(array)[rows], dims=("sequence", *dims), coords=coords, name=name)
        if summary.nbytes <= _KEPT_BYTES:
            self._cache[name] = summary
        return summary

    def _read_array(self, array: zarr.Array) -> np.ndarray:
        """Return all rows of a summary; those of units that are not committed are the fill value."""
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
    def _cache(self) -> dict[str, xr.DataArray]:
        """Summaries that were asked for once, if they are small."""
        return {}

    @cached_property
    def _totals(self) -> dict[str, xr.DataArray]:
        """Return totals that were asked for once, if they are small."""
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
        with reading(self.storage, f"total {name!r}"):
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
        groups, which = self._groups
        of_sequence = np.full(len(self.layout.lengths), totals.NO_GROUP)
        of_sequence[self._visible] = which
        values = totals.total(array, name, self._committed_units, of_sequence, len(groups), self.layout.unit_sequences)
        return xr.DataArray(values, dims=dims, coords=coords, name=name)

    def _total_over_the_run(self, name: str, dims: tuple[str, ...], coords: dict[str, Any]) -> xr.DataArray:
        """Return a sum that is stored of the complete run alone, computed from the tokens of the sequences left."""
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
        """Dimensions of a summary after the first, and their coordinates."""
        dims = tuple(array.metadata.dimension_names)[1:]
        coords: dict[str, Any] = {"channel": list(CHANNELS)}
        coords |= {"layer": np.arange(self.model["n_layers"])} if "layer" in dims else {}
        name = str(array.path).rpartition("/")[2]
        matching = [a for a in self.spec.selected if name.startswith(f"{a.name}_")]
        if not matching or len(dims) < 2:
            return dims, coords
        recorded = max(matching, key=lambda a: len(a.name))
        return (dims[0], "layer", *views.summary_dims(recorded, dims[2:])), coords | {
            "layer": np.array(recorded.layers)
        }


def _over_the_run(name: str) -> bool:
    return name in totals.PER_UNIT or name.endswith("_sketch")
