"""The version: what the installer recorded, and stamped into every dataset."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import workbench
from workbench.cli import app
from workbench.studies.result import provenance
from workbench.version import version


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert workbench.__version__ == version() == metadata.version("gpt-oss-workbench")
    assert provenance("s", "t", "d", 0, {})["workbench_version"] == version()


def test_a_source_tree_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("workbench.version.installed_version", missing)
    assert version.__wrapped__() == "0+unknown"


def test_the_command_shows_the_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.strip()) == (0, version())


def test_no_file_repeats_the_version() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert "\nversion:" not in (root / "CITATION.cff").read_text()
