"""Lazy rows of a stored array: what an array holds for some spans of tokens, as a dask array that reads nothing yet."""

from typing import Any

import dask.array as da
import numpy as np
import zarr


class _Span:
    """The rows of one span of a stored array, as an array that `dask.array.from_array` slices."""

    def __init__(self, array: zarr.Array, axis: int, rows: slice) -> None:
        self._array, self._axis, self._rows = array, axis, rows
        length = rows.stop - rows.start
        self.shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
        self.dtype, self.ndim = array.dtype, array.ndim

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        own = index[self._axis]
        first = self._rows.start
        if isinstance(own, slice):
            start, stop, step = own.indices(self.shape[self._axis])
            if step < 1:  # zarr reads forward only
                return np.asarray(self._array[(*(slice(None),) * self._axis, self._rows)])[index]
            inside: Any = slice(first + start, first + max(start, stop), step)
        else:
            inside = first + int(own) % self.shape[self._axis]
        return np.asarray(self._array[(*index[: self._axis], inside, *index[self._axis + 1 :])])


def lazy_rows(array: zarr.Array, axis: int, spans: list[slice]) -> da.Array:
    """Return the rows of these spans as one lazy array, a span a block along `axis`.

    One span alone, such as a sequence of a large run, is an array of its own blocks: a dask array of all blocks of the
    run, of which there are tens of thousands, would take a second to make.
    """
    grain = array.shards or array.chunks
    if len(spans) == 1:
        (rows,) = spans
        cuts = [
            rows.start,
            *range(-(-(rows.start + 1) // grain[axis]) * grain[axis], rows.stop, grain[axis]),
            rows.stop,
        ]
        lengths = tuple(np.diff(cuts).tolist()) if rows.stop > rows.start else (0,)
        chunks = (*grain[:axis], lengths, *grain[axis + 1 :])
        empty = np.empty((0,) * array.ndim, dtype=array.dtype)
        return da.from_array(_Span(array, axis, rows), chunks=chunks, name=False, fancy=False, meta=empty)
    stored = da.from_zarr(array, chunks=grain)
    before = [slice(None)] * axis
    parts = [stored[(*before, span)] for span in spans]
    return da.concatenate(parts, axis) if parts else stored[(*before, slice(0))]
