"""A path that is no run is refused by what it is."""

from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.runs import open_run


def test_what_is_no_run_is_named(tmp_path: Path, demo_run: Path) -> None:
    (tmp_path / "file.zarr").write_text("hi")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "notes.txt").write_text("hi")
    reasons = {
        "missing.zarr": "does not exist",
        "file.zarr": "is a file",
        "empty.zarr": "is an empty folder",
        "other.zarr": "is not a run",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            open_run(tmp_path / name)
    assert open_run(demo_run).sequences is not None, "negative control: a run is opened"
