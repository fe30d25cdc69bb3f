"""The version: that of the code which runs, and stamped into every dataset."""

import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import workbench
import workbench.version as versions
from workbench.cli import app
from workbench.studies.result import provenance
from workbench.version import checkout_version, version


def test_every_dataset_has_the_version() -> None:
    assert workbench.__version__ == version()
    assert provenance("s", "t", "d", 0, {})["workbench_version"] == version()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of two commits."""
    (tmp_path / "pyproject.toml").write_text('[tool.setuptools_scm]\nfallback_version = "0.3.0"\n')
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    for subject in ("one", "two"):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", subject)
    return tmp_path


def test_a_checkout_has_the_version_of_its_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "--short=9", "HEAD")
    assert checkout_version(checkout) == f"0.3.1.dev2+g{commit}"
    git(checkout, "commit", "-q", "--allow-empty", "-m", "three")
    later = git(checkout, "rev-parse", "--short=9", "HEAD")
    assert checkout_version(checkout) == f"0.3.1.dev3+g{later}" != f"0.3.1.dev3+g{commit}"
    monkeypatch.setenv("GIT_DIR", str(checkout / "none"))  # as in a hook of another repository
    assert checkout_version(checkout) == f"0.3.1.dev3+g{later}"


def test_changed_files_are_part_of_the_version(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text((checkout / "pyproject.toml").read_text() + "# changed\n")
    assert str(checkout_version(checkout)).endswith(".dirty")


def test_a_tag_is_the_version_and_commits_lead_to_the_next(checkout: Path) -> None:
    git(checkout, "tag", "v1.4.2")
    assert checkout_version(checkout) == "1.4.2"
    git(checkout, "commit", "-q", "--allow-empty", "-m", "three")
    commit = git(checkout, "rev-parse", "--short=9", "HEAD")
    assert checkout_version(checkout) == f"1.4.3.dev1+g{commit}"


def test_what_was_installed_earlier_is_not_the_version_of_a_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = checkout / "workbench"
    package.mkdir()
    monkeypatch.setattr(versions, "__file__", str(package / "version.py"))
    monkeypatch.setattr(versions, "installed_version", lambda name: "0.1.1.dev754+ga303f0d1d")
    assert version.__wrapped__() == checkout_version(checkout)
    monkeypatch.setattr(versions, "_git", lambda *_: "")  # git is not installed
    assert version.__wrapped__() == "0.1.1.dev754+ga303f0d1d.or.later"


def test_elsewhere_it_is_the_installed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "workbench" / "version.py"))
    assert version.__wrapped__() == metadata.version("gpt-oss-workbench")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "installed_version", missing)
    assert version.__wrapped__() == "0+unknown"


def test_the_command_shows_the_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.strip()) == (0, version())


def test_no_file_repeats_the_version() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert "\nversion:" not in (root / "CITATION.cff").read_text()
