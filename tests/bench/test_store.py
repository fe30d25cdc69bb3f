"""The three ways of `bench store` write the same array, and each has a row."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from workbench.bench import store


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOKENS", 64), ("CHUNK", 32), ("WIDTH", 6), ("LAYERS", 2)):
        monkeypatch.setattr(store, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", [store._workbench, store._zarr_same_shards, store._zarr_default])
def test_each_way_stores_the_values(way: object, tmp_path: Path) -> None:
    values = np.arange(2 * 64 * 6, dtype=np.uint16).reshape(2, 64, 6)
    way(tmp_path / "a", values)  # type: ignore[operator]
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], values)


@pytest.mark.usefixtures("small")
def test_each_way_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    result = store.run(streams=1, rounds=1)
    assert [row["way"] for row in result["ways"]] == ["workbench", "zarr, same shards", "zarr, its own chunks"]
    assert all(row["seconds"] > 0 and 0 < row["stored"] < 20 for row in result["ways"])
    assert "zarr, same shards" in capsys.readouterr().out
