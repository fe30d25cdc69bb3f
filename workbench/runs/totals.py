"""Summaries summed over all sequences of an effort and task, stored because dashboards read them first.

They are written when a run is finished, so that a question about ten million tokens reads a few kilobytes; of a run
that is not, they are summed when asked for.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Int, Num

from workbench.runs import shards
from workbench.runs.schema import Unit

PER_UNIT = ("coactivation", "transition")  # summed over sequences already; of the run, not of a group
NO_GROUP = -1  # of a sequence that takes no part
_MOST_GROUPS = 256


def groups(sequences: pd.DataFrame) -> tuple[pd.DataFrame, Int[np.ndarray, " sequence"]]:
    """Return the efforts and tasks that occur, sorted, and the row of each sequence; efforts alone for many tasks."""
    keys = sequences[["effort", "task"]].astype(str)
    if len(keys.drop_duplicates()) > _MOST_GROUPS:
        keys = keys.assign(task="")
    pairs = keys.drop_duplicates().sort_values(["effort", "task"], ignore_index=True)
    which = keys.merge(pairs.reset_index(names="group"), how="left", on=["effort", "task"])["group"]
    return pairs, which.to_numpy(dtype=np.int64)


def total(
    array: zarr.Array, name: str, units: list[Unit], group: Int[np.ndarray, " sequence"], n_groups: int, rows: int
) -> Num[np.ndarray, "group *cell"]:
    """Return the totals of a summary: rows of each group added in the order of the units, in int64 or float64.

    group: of every sequence of the run by its number, or NO_GROUP. rows: summary rows of a unit.
    """
    pairs = name in PER_UNIT or name.endswith("_sketch")
    dtype = np.float64 if array.dtype.kind == "f" else np.int64
    out = np.zeros(array.shape[1:] if pairs else (n_groups, *array.shape[1:]), dtype)
    for unit, values in _read(array, units, 1 if pairs else rows):
        if pairs:
            out += values[0]
            continue
        for at, sequence in enumerate(unit.sequences):
            if group[sequence] != NO_GROUP:
                out[group[sequence]] += values[at]
    return out


def _read(array: zarr.Array, units: list[Unit], rows: int) -> Iterator[tuple[Unit, np.ndarray]]:
    """Yield a unit's rows, in order; some units ahead at a time, so that memory is bounded."""

    def read(unit: Unit) -> np.ndarray:
        return np.asarray(array[unit.index * rows : (unit.index + 1) * rows])

    ahead = 4 * shards.threads()
    with ThreadPoolExecutor(shards.threads()) as pool:
        for first in range(0, len(units), ahead):
            block = units[first : first + ahead]
            yield from zip(block, pool.map(read, block), strict=True)
