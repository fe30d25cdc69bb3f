"""A path that is no run is refused by what it is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from tests.runs.conftest import make_older
from tests.runs.forging import forge
from workbench.errors import InputError
from workbench.runs import open_run
from workbench.runs.verify import verify


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


def of_schema(number: Any) -> Callable[[Path], None]:
    return lambda run: zarr.open_group(str(run)).attrs.update({"schema": number})


def with_newer_field(run: Path) -> None:
    attributes = zarr.open_group(str(run)).attrs
    attributes["spec"] = attributes["spec"] | {"thoughts": [1]}


def with_other_layers(run: Path) -> None:
    attributes = zarr.open_group(str(run)).attrs
    activation = attributes["spec"]["activations"][0]
    attributes["spec"] = attributes["spec"] | {"activations": [activation | {"layers": [1, 2]}]}


def with_a_sequence_at_another_place(run: Path) -> None:
    zarr.open_group(str(run))["sequences/offset"][1] = 0


def without_a_column(run: Path) -> None:
    shutil.rmtree(run / "tokens" / "channel")


@pytest.mark.filterwarnings("ignore::workbench.runs.reader.NoChecksumsWarning")
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_schema(5), "newer than this workbench's 4: update the workbench"),
        (of_schema(0), "not a run"),
        (of_schema(True), "not a run"),
        (with_newer_field, "recorded with 'thoughts', which this workbench does not have: update the workbench"),
        (with_other_layers, "activations/hook_resid_post has another shape, dtype or dimensions"),
        (with_a_sequence_at_another_place, "do not follow its units"),
        (without_a_column, "tokens/channel.* is missing"),
    ],
)
def test_a_run_of_another_format_is_refused(
    run_path: Path, change: Callable[[Path], None], reason: str, older: bool
) -> None:
    """Of an older schema without checksums, too, and one whose checksums agree with it."""
    if older:
        make_older(run_path)
    assert open_run(run_path).dataset.sizes["token"] > 0, "negative control"
    change(run_path)
    if not older:
        forge(run_path)
    with pytest.raises(InputError, match=reason):
        open_run(run_path).dataset.compute()
    assert verify(run_path)
