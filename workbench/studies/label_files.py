"""Files of labels beside a run, as JSON Lines: what those of experts and those of features have in common."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError

_MAX_BYTES = 2**28
MAX_LABEL = 200  # characters


def path_beside(run: Any, suffix: str) -> Path:
    """Return the path of a file of labels beside a run, `RUN.suffix`.

    Raises:
        InputError: the run is on an object storage.
    """
    if "://" in str(run.path):
        raise InputError(f"{run.path}: labels are kept beside a run in a local folder: copy the run")
    path = Path(str(run.path))
    return path.with_name(f"{path.name}.{suffix}")


def objects(file: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of labels, each with the text that names its line in an error. example: of a line.

    Raises:
        InputError: the file is too large or no UTF-8, or a line is no JSON object.
    """
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise InputError(f"{file} has {size:,} bytes, expected at most {_MAX_BYTES:,} of labels")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a label may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row = parse_json(line)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object such as {example}")
        yield where, row


def cleaned(text: str) -> str:
    """Return a label as one line of printable characters, at most 200."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_LABEL]
