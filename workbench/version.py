"""The version of the workbench as installed; setuptools-scm derives it from git (see pyproject.toml)."""

from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


@cache
def version() -> str:
    """Return the installed version, as in "0.1.dev740+g1234567"; "0+unknown" where it is not installed."""
    try:
        return installed_version("gpt-oss-workbench")
    except PackageNotFoundError:
        return "0+unknown"
