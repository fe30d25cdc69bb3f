"""An unexpected error of a command names the damage of its run; an error of the input is left as it is."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import DATA
from workbench.cli.damage import names_damage
from workbench.errors import InputError
from workbench.runs.manifest import DamageError


@names_damage
def command(run: str, *, error: type[Exception]) -> None:
    raise error("cannot read")


def test_a_damaged_run_is_named_as_the_cause_of_an_unexpected_error(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    shutil.copytree(DATA / "demo.zarr", run)
    with pytest.raises(KeyError, match="cannot read"):
        command(str(run), error=KeyError)  # negative control: a valid run leaves the error as it is
    (run / "units" / "committed" / "zarr.json").unlink()
    with pytest.raises(DamageError, match=r"units/committed"):
        command(str(run), error=KeyError)
    with pytest.raises(InputError, match=r"^cannot read$"):
        command(str(run), error=InputError)


def test_a_run_that_is_not_written_yet_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="cannot read"):
        command(str(tmp_path / "new.zarr"), error=KeyError)
    (tmp_path / "new.zarr").mkdir()
    (tmp_path / "new.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(DamageError):  # negative control: what is there is verified
        command(str(tmp_path / "new.zarr"), error=KeyError)
