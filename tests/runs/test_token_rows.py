"""The tokens of a run as one lazy array: the same as numpy's selection, in blocks of equal length."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench.runs.token_rows as module
from workbench.runs.token_rows import TokenRows, chosen_bounds, span_bounds, token_rows

STORED = np.arange(3 * 200 * 2).reshape(3, 200, 2)


def array() -> zarr.Array:
    stored = zarr.create_array({}, shape=STORED.shape, chunks=(1, 8, 2), shards=(1, 32, 2), dtype=STORED.dtype)
    stored[:] = STORED
    return stored


ARRAY = array()
ENDS = st.lists(st.integers(0, 200), unique=True, max_size=24).map(sorted)
NUMBERS = st.none() | st.integers(-150, 150)
SLICES = st.builds(slice, NUMBERS, NUMBERS, st.sampled_from([None, 1, 3, 40, -1, -7]))


def expected(spans: list[slice]) -> np.ndarray:
    return np.concatenate([STORED[:, span] for span in (*spans, slice(0, 0))], axis=1)


@settings(deadline=None)
@given(ENDS, SLICES, st.integers(0, 2) | st.just(slice(None)))
def test_rows_are_those_of_the_spans(ends: list[int], rows: slice, layer: int | slice) -> None:
    spans = [slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)]
    read = TokenRows(ARRAY, 1, span_bounds(spans))[layer, rows, :]
    np.testing.assert_array_equal(read, expected(spans)[layer, rows, :])
    if rows.step is not None and rows.step < 0:
        return  # Dask itself takes a start before the first row for the last
    lazy = token_rows(ARRAY, 1, span_bounds(spans))
    np.testing.assert_array_equal(lazy[layer, rows].compute(scheduler="sync"), expected(spans)[layer, rows])


@settings(deadline=None)
@given(ENDS, st.sets(st.integers(0, 199)))
def test_chosen_rows_are_those_of_the_spans(ends: list[int], chosen: set[int]) -> None:
    spans = [slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)]
    rows = np.array(sorted(c for c in chosen if c < expected(spans).shape[1]), dtype=np.int64)
    bounds = chosen_bounds(span_bounds(spans), rows)
    np.testing.assert_array_equal(TokenRows(ARRAY, 1, bounds)[:, :, :], expected(spans)[:, rows])


def test_a_number_removes_the_axis() -> None:
    spans = [slice(10, 20), slice(100, 150)]
    np.testing.assert_array_equal(TokenRows(ARRAY, 1, span_bounds(spans))[:, 12, :], expected(spans)[:, 12])


def test_blocks_are_of_equal_length_wherever_the_gaps_are() -> None:
    spans = [slice(0, 30), slice(32, 63), slice(64, 70)]
    assert token_rows(ARRAY, 1, span_bounds(spans)).chunks == ((1, 1, 1), (32, 32, 3), (2,))
    assert token_rows(ARRAY, 1, span_bounds([])).shape == (3, 0, 2)


def test_rows_without_their_shift_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(module, "_stored", lambda bounds, rows: rows)
    spans = [slice(10, 20), slice(100, 150)]
    assert not np.array_equal(TokenRows(ARRAY, 1, span_bounds(spans))[:, :, :], expected(spans))
