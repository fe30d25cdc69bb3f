"""Runs commands of the workbench in this process, and lists the files that they leave."""

import contextlib
import hashlib
import io
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench import cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def problem(self, *, codes: tuple[int, ...] = (0, 1, 2)) -> str:
        """What is wrong with how a command ended, "" if nothing is."""
        lines = [line for line in self.err.splitlines() if line.startswith("workbench: ")]
        if self.code not in codes:
            return f"exit code {self.code}"
        if self.code == 2 and (len(lines) != 1 or not self.err.rstrip("\n").endswith(lines[0])):
            return f"not one line that ends standard error: {self.err[-500:]!r}"
        return "" if "Traceback" not in self.err else f"a traceback: {self.err[-500:]}"


def run_command(*arguments: str, out: io.TextIOBase | None = None) -> Result:
    """The exit code, output and errors of `workbench …`. An error that leaves `main` leaves this function too."""
    out, err = out or io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["workbench", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    printed = out.getvalue() if isinstance(out, io.StringIO) else ""
    return Result(int(left.value.code or 0), printed, err.getvalue())


_SETTLED_S = 0.1  # after this time a change of a file shows in its times, however coarse they are
_digests: dict[tuple[int, ...], str] = {}


def digest(path: Path) -> str:
    """The SHA-256 of a file, from an earlier call if the file was not changed since."""
    about = path.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key in _digests:
        return _digests[key]
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if time.time() - about.st_ctime > _SETTLED_S:
        _digests[key] = checksum
    return checksum


def snapshot(folder: Path) -> dict[str, str]:
    """What every entry of a folder is: the target of a link, the digest of a file, the kind of anything else."""
    contents = {}
    for at, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(at, name)
            if path.is_symlink():
                what = f"link to {os.readlink(path)}"
            elif path.is_file() and path.stat().st_size < 2**30:
                what = digest(path)
            else:
                what = "folder" if path.is_dir() else "special"
            contents[str(path.relative_to(folder))] = what
    return contents
