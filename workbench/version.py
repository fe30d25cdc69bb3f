"""The version of the code that runs: from git in a checkout, and from what the installer recorded elsewhere.

An editable installation records the version of the commit at which it was installed, and the code goes on from there.
In a checkout the version is therefore made from git by the rule of setuptools-scm, which also makes it for a wheel:
"0.1.1.dev740+g1234567" is the 740th commit after version 0.1.0. ".dirty" is added where files differ from that commit,
and ".or.later" to the recorded version where git is not installed or refuses.
"""

import os
import re
import subprocess
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

_GIT_S = 20.0
_DESCRIPTION = re.compile(r"(?:v?(?P<tag>.+)-(?P<commits>\d+)-g)?(?P<commit>[0-9a-f]{7,})(?P<dirty>-dirty)?")


@cache
def version() -> str:
    """Return the version of the code that runs, as in "0.1.1.dev740+g1234567"; "0+unknown" where there is none."""
    root = Path(__file__).resolve().parents[1]
    if of_checkout := checkout_version(root):
        return of_checkout
    try:
        installed = installed_version("gpt-oss-workbench")
    except PackageNotFoundError:
        return "0+unknown"
    return f"{installed}{'.' if '+' in installed else '+'}or.later" if (root / ".git").exists() else installed


def checkout_version(root: Path) -> str | None:
    """Return the version of the checkout in this folder; None if it is none, or git does not answer."""
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    described = _DESCRIPTION.fullmatch(_git(root, "describe", "--tags", "--long", "--always", "--abbrev=9", "--dirty"))
    if described is None:
        return None
    tag, commits, dirty = described["tag"], described["commits"], ".dirty" if described["dirty"] else ""
    if tag is None:
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        tag = str(settings.get("tool", {}).get("setuptools_scm", {}).get("fallback_version", "0"))
        commits = _git(root, "rev-list", "--count", "HEAD")
    elif commits == "0" and not dirty:
        return str(tag)
    *major, last = tag.split(".")
    following = [*major, str(int(last) + 1)] if last.isdigit() else [tag]
    return f"{'.'.join(following)}.dev{commits}+g{described['commit']}{dirty}"


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints; "" where it is not installed, refuses, or does not end."""
    # variables that git sets for its hooks would name another repository
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_S,
            stdin=subprocess.DEVNULL,
            env=plain | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
