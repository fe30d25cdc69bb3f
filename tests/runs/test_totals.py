"""Totals of a finished run are the sums of its sequences; damage in them is found.

Also tests `workbench.runs.summed`.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr

import workbench as wb
from tests.conftest import DATA
from tests.runs.conftest import make_older, write_run
from workbench.runs.reader import open_run
from workbench.runs.verify import verify


def test_totals_are_sums_over_the_sequences_of_a_group(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    run = open_run(tmp_path / "r")
    assert set(run.group["totals"].array_keys()) == set(run.summaries)
    for name in ("tokens", "expert_count", "sink_sum"):
        total, by_sequence = run.total(name), run.summary(name)
        for group in range(total.sizes["group"]):
            own = by_sequence["effort"].values == str(total["effort"].values[group])
            own &= by_sequence["task"].values == str(total["task"].values[group])
            np.testing.assert_allclose(total[group], by_sequence.values.astype(np.float64)[own].sum(0), rtol=1e-6)
        np.testing.assert_allclose(total.sum("group"), by_sequence.values.astype(np.float64).sum(0), rtol=1e-6)


def test_an_unfinished_run_adds_up_what_is_committed(tmp_path: Path) -> None:
    write_run(tmp_path / "r", units=[0, 2])
    run = open_run(tmp_path / "r")
    assert "totals" not in run.group
    np.testing.assert_array_equal(run.total("tokens").sum("group"), run.summary("tokens").sum("sequence"))
    write_run(tmp_path / "r")
    finished = open_run(tmp_path / "r")
    np.testing.assert_array_equal(finished.total("tokens").sum("group"), finished.summary("tokens").sum("sequence"))


def test_totals_of_the_bundled_run_of_an_older_schema_are_summed() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    total = run.total("expert_count")
    assert int(total.sum()) == run.dataset.sizes["token"] * 4 * 4


@pytest.mark.parametrize("name", ["expert_count", "coactivation"])
def test_a_wrong_total_is_found(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "r")
    make_older(tmp_path / "r")
    assert not verify(tmp_path / "r")
    array = zarr.open_group(str(tmp_path / "r"))[f"totals/{name}"]
    array[(0,) * array.ndim] = 12345
    assert [p.where for p in verify(tmp_path / "r")] == [f"totals/{name}"]


def test_blocks_of_one_layer_are_those_of_all() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    for layer in (0, 3):
        for one, complete in zip(
            run.blocks("experts", "sink", layer=layer), run.blocks("experts", "sink"), strict=True
        ):
            for name in ("experts", "sink"):
                np.testing.assert_array_equal(one[name], complete[name][layer : layer + 1])
            np.testing.assert_array_equal(one["sequence"], complete["sequence"])
