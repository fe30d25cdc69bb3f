"""Tokens of a run as one lazy array in blocks of equal length, although gaps lie between its units.

xarray writes only blocks of equal length to Zarr, and a block is one task of Dask, wherever the gaps are.
"""

from collections.abc import Sequence

import dask.array as da
import numpy as np
import zarr
from jaxtyping import Int, Shaped


def span_bounds(spans: Sequence[slice]) -> Int[np.ndarray, "span 2"]:
    """Return the first row of each span and the row after its last."""
    return np.array([(span.start, span.stop) for span in spans], dtype=np.int64).reshape(-1, 2)


def chosen_bounds(bounds: Int[np.ndarray, "span 2"], rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, "chosen_span 2"]:
    """Return the bounds of the spans that ascending rows of these spans make up."""
    stored = _stored(bounds, rows)
    first = np.flatnonzero(np.diff(stored, prepend=-2) != 1)
    last = np.flatnonzero(np.diff(stored, append=-2) != 1)
    return np.stack([stored[first], stored[last] + 1], axis=1)


def token_rows(array: zarr.Array, axis: int, bounds: Int[np.ndarray, "span 2"]) -> da.Array:
    """Return the rows of these spans as one lazy array, in blocks as long as a shard along `axis`."""
    rows = TokenRows(array, axis, bounds)
    grain = array.shards or array.chunks
    chunks = (*grain[:axis], max(1, min(grain[axis], rows.shape[axis])), *grain[axis + 1 :])
    # named at random: a name made from the content would need the array to be pickled
    return da.from_array(rows, chunks=chunks, name=False, fancy=False, meta=np.empty((0,) * array.ndim, array.dtype))


class TokenRows:
    """A stored array without the rows outside of some spans; what is indexed is read, a shard at a time."""

    def __init__(self, array: zarr.Array, axis: int, bounds: Int[np.ndarray, "span 2"]) -> None:
        self._array, self._axis, self._bounds = array, axis, bounds
        n = int((bounds[:, 1] - bounds[:, 0]).sum())
        self.shape = (*array.shape[:axis], n, *array.shape[axis + 1 :])
        self.dtype, self.ndim = array.dtype, array.ndim

    def __getitem__(self, key: tuple[slice | int, ...]) -> Shaped[np.ndarray, "*selected"]:
        """Return the values at a slice or a number of each axis."""
        before, at, after = key[: self._axis], key[self._axis], key[self._axis + 1 :]
        rows = range(self.shape[self._axis])[at if isinstance(at, slice) else slice(at, at + 1)]
        forward = rows if rows.step > 0 else rows[::-1]
        axis = sum(isinstance(k, slice) for k in before)  # a number removes its axis
        read = []
        for group in self._groups(_stored(self._bounds, np.arange(forward.start, forward.stop, forward.step))):
            first, stop = (int(group[0]), int(group[-1]) + 1) if len(group) else (0, 0)
            block = np.asarray(self._array[(*before, slice(first, stop), *after)])
            read.append(block if len(group) == stop - first else block.take(group - first, axis))
        values = np.concatenate(read, axis) if len(read) > 1 else read[0]
        if rows.step < 0:
            values = np.flip(values, axis)
        return values if isinstance(at, slice) else values.take(0, axis)

    def _groups(self, stored: Int[np.ndarray, " row"]) -> list[Int[np.ndarray, " row_of_group"]]:
        """Return rows that are read together: they are in one shard, and no chunk lies between two of them."""
        grain = (self._array.shards or self._array.chunks)[self._axis]
        apart = (np.diff(stored) > self._array.chunks[self._axis]) | (np.diff(stored // grain) != 0)
        return np.split(stored, np.flatnonzero(apart) + 1)


def _stored(bounds: Int[np.ndarray, "span 2"], rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """Return the numbers that rows of these spans have in the stored array."""
    if not len(rows):
        return rows
    lengths = bounds[:, 1] - bounds[:, 0]
    ends = np.cumsum(lengths)
    return rows + (bounds[:, 0] - (ends - lengths))[np.searchsorted(ends, rows, side="right")]
