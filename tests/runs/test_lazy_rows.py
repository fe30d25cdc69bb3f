"""Lazy rows are those of the stored array, whatever is sliced, and those of one span make few blocks."""

from typing import Any

import numpy as np
import pytest
import zarr

from workbench.runs import lazy_rows as module
from workbench.runs.lazy_rows import lazy_rows

SPANS = [slice(0, 1), slice(3, 30), slice(16, 32), slice(15, 17), slice(40, 41), slice(7, 7), slice(0, 41)]
INDICES: list[Any] = [slice(None), slice(1, 5), slice(None, None, 2), slice(None, None, -1), 0, [0, 2, 1], slice(2, 2)]


def stored(axis: int) -> tuple[zarr.Array, np.ndarray]:
    shape, grain = ((41, 3), (16, 3)) if axis == 0 else ((3, 41, 2), (1, 16, 2))
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    array = zarr.create_array({}, shape=shape, chunks=grain, dtype=values.dtype)
    array[...] = values
    return array, values


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_those_of_the_array(axis: int) -> None:
    array, values = stored(axis)
    for span in SPANS:
        wanted = values[(*(slice(None),) * axis, span)]
        for index in INDICES:
            if wanted.shape[axis] < 3 and not isinstance(index, slice):
                continue
            at = (*(slice(None),) * axis, index)
            np.testing.assert_array_equal(lazy_rows(array, axis, [span])[at].compute(), wanted[at])
            if axis:
                np.testing.assert_array_equal(lazy_rows(array, axis, [span])[(1, index)].compute(), wanted[1][index])
    several = lazy_rows(array, axis, SPANS).compute()
    np.testing.assert_array_equal(several, np.concatenate([values[(*(slice(None),) * axis, s)] for s in SPANS], axis))


def test_one_span_makes_its_own_blocks_only() -> None:
    array, _ = stored(1)
    assert len(dict(lazy_rows(array, 1, [slice(3, 30)]).__dask_graph__())) < 3 * 2 + 2
    assert len(dict(lazy_rows(array, 1, [slice(3, 9), slice(9, 30)]).__dask_graph__())) > 3 * 3, "negative control"


def test_a_span_that_begins_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    array, values = stored(0)
    right = module._Span.__init__

    def wrong(self: Any, array: zarr.Array, axis: int, rows: slice) -> None:
        right(self, array, axis, slice(rows.start + 1, rows.stop + 1))

    monkeypatch.setattr(module._Span, "__init__", wrong)
    assert (lazy_rows(array, 0, [slice(3, 30)]).compute() != values[3:30]).any()
