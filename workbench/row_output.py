"""JSON Lines files to which a long command appends: resumable, locked, and replaced only if the command wrote them.

Every row states in `meta.workbench` which command wrote it and what the job was, so a file alone shows whether it
can be resumed. A row is on the disk before the next is begun; half a row that a kill left is cut off when the next is
written, not before. With `overwrite` the rows go to a file beside the old one, which they replace with the first row.

    with RowOutput("answers.jsonl", command="generate", inputs=["prompts.jsonl"]) as rows:
        rows.write({"id": "a", …})                       # rows.known: those that were there
        rows.finish(ids)                                 # in this order
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.file_lock import FileLock
from workbench.outputs import check_output

KEY = "workbench"  # of a row's meta
_PART = ".part"


def stamp(row: Mapping[str, Any], command: str, **job: Any) -> dict[str, Any]:
    """Return a row that states which command wrote it, and for which job."""
    return {**row, "meta": {**(row.get("meta") or {}), KEY: {"command": command, **job}}}


def is_stamped(row: Mapping[str, Any], command: str) -> bool:
    """Return whether a command wrote a row."""
    meta = row.get("meta")
    about = meta.get(KEY) if isinstance(meta, dict) else None
    return isinstance(about, dict) and about.get("command") == command


def written_by(command: str) -> Callable[[Path], bool]:
    """Return a function that decides whether a command wrote every row of a file."""

    def owned(path: Path) -> bool:
        try:
            rows, end = _read(path)
            return end == path.stat().st_size and all(is_stamped(row, command) for row in rows.values())
        except (InputError, OSError):
            return False

    return owned


class RowOutput:
    """A file of rows with unique ids, held by one process at a time.

    is_own: whether the command wrote a row; its stamp decides by default. known: the rows that are there, by id.

    Raises:
        InputError: the file may not be written, or holds rows that another command wrote.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        command: str,
        inputs: Iterable[str | Path] = (),
        overwrite: bool = False,
        is_own: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self.path, self._command, self._overwrite = Path(out), command, overwrite
        self._is_own = is_own or (lambda row: is_stamped(row, command))
        self._file: BinaryIO | None = None
        self._end = 0  # of the last complete row of an existing file
        self.known: dict[str, dict[str, Any]] = {}
        # what exists is looked at below, under the lock
        check_output(self.path, command=command, inputs=inputs, overwrite=True, owned=lambda path: path.is_file())
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path.parent} is not a folder: create it first")
        self._part = self.path.with_name(f".{self.path.name}{_PART}")
        self._lock = FileLock(self.path)

    def __enter__(self) -> "RowOutput":
        self._lock.acquire()
        try:
            with suppress(FileNotFoundError):
                self._part.unlink()  # of a process that was killed before its first row
            if self.path.exists():
                self._read_existing()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._file is not None:
                with suppress(OSError):  # what could not be written cannot be flushed either
                    self._file.close()
                self._file = None
            self._part.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _read_existing(self) -> None:
        rows, end = _read(self.path)
        bad = next((n for n, row in enumerate(rows.values(), 1) if not self._is_own(row)), None)
        with open(self.path, "rb") as file:
            file.seek(end)
            rest = file.read(1)  # of the row that a killed process began
        if bad is not None or rest not in (b"", b"{") or (not rows and rest):
            raise _not_ours(self.path, bad or len(rows) + 1)
        if not self._overwrite:
            self.known, self._end = rows, end

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        line = json.dumps({k: v for k, v in row.items() if v is not None}).encode() + b"\n"
        try:
            fresh = self._file is None and not self.known
            if self._file is None:
                self._file = self._open(fresh)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            if fresh:
                os.replace(self._part, self.path)
        except OSError as error:
            reason = f"{error.strerror or error}; the rows before this one are kept"
            raise InputError(f"{self.path} cannot be written: {reason}") from error

    def _open(self, fresh: bool) -> BinaryIO:
        """Return the file to append to: a new one beside the path, or the one to resume, cut after its last row."""
        if fresh:
            return open(self._part, "xb")
        file = open(self.path, "r+b")  # noqa: SIM115  closed by __exit__
        file.truncate(self._end)
        file.seek(self._end)
        return file

    def finish(self, ids: Iterable[str]) -> None:
        """Sort the rows into this order of ids, so that a finished file does not depend on interruptions.

        Every id must be there.

        Raises:
            InputError: the file cannot be written.
        """
        places, content = {}, self.path.read_bytes()
        start = 0
        while start < len(content):
            end = content.index(b"\n", start) + 1
            places[parse_json(content[start:end])["id"]] = slice(start, end)
            start = end
        ordered = b"".join(content[places[id]] for id in ids)
        if ordered == content:
            return
        try:
            with open(self._part, "xb") as file:
                file.write(ordered)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._part, self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the complete rows of a file by id, and where the last of them ends.

    Raises:
        InputError: a line is not a row with an id.
    """
    rows: dict[str, dict[str, Any]] = {}
    end = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = parse_json(line.decode("utf-8"))
                    rows[str(row["id"])] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise _not_ours(path, number) from error
                end += len(line)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return rows, end


def _not_ours(path: Path, line: int) -> InputError:
    return InputError(
        f"{path} exists, and line {line}: not a transcript that this command wrote; choose another name, or remove it"
    )
