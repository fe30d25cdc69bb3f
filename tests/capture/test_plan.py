"""Units: every sequence once and in order, whole shards, nobody's rows shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.capture.plan import plan_units
from workbench.errors import InputError


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=60), st.sampled_from([1024, 2048, 4096]))
def test_a_plan_is_a_partition_into_whole_shards(lengths: list[int], unit_tokens: int) -> None:
    layout = plan_units(lengths, unit_tokens)
    assert [s for unit in layout.units for s in unit.sequences] == list(range(len(lengths)))
    start = 0
    for unit in layout.units:
        assert unit.start == start
        assert unit.capacity % unit_tokens == 0
        assert unit.capacity == max(unit_tokens, -(-lengths[unit.sequences[0]] // unit_tokens) * unit_tokens)
        row = unit.start
        for s in unit.sequences:
            assert layout.offsets[s] == row
            row += lengths[s]
        assert row <= unit.start + unit.capacity
        start += unit.capacity
    assert layout.n_rows == start
    for before, after in zip(layout.units, layout.units[1:], strict=False):
        used = sum(lengths[s] for s in before.sequences)
        assert used + lengths[after.sequences[0]] > before.capacity, (
            "a unit was closed though the next would have fitted"
        )


@pytest.mark.parametrize("unit_tokens", [0, -1024, 512, 1500])
def test_a_unit_that_is_no_whole_chunks_is_refused(unit_tokens: int) -> None:
    with pytest.raises(InputError, match="multiple"):
        plan_units([5], unit_tokens)


def test_nothing_to_capture_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to capture"):
        plan_units([])
