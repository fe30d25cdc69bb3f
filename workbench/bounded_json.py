"""JSON from files of others, read with limits of size and depth."""

import json
import re
import stat
from pathlib import Path
from typing import Any

from workbench.errors import InputError, refuse_lfs_pointer

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str, *, max_depth: int = MAX_DEPTH) -> Any:
    """Return what a JSON text says.

    Raises:
        InputError: it is not JSON, or nests lists and objects deeper than `max_depth`.
    """
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match.group()
        depth += (token in "[{") - (token in "]}")
        if depth > max_depth:
            raise InputError(f"lists and objects are nested deeper than {max_depth} levels")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Return what a JSON file in UTF-8 says; no more than `max_bytes` of it are read.

    Raises:
        InputError: it is not JSON in UTF-8, a git-lfs pointer, larger than `max_bytes`, or nested too deep.
        OSError: it cannot be read.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError("the file is a device or a pipe")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    refuse_lfs_pointer(path, content)
    if len(content) > max_bytes:
        raise InputError(f"the file is larger than {max_bytes:,} bytes")
    try:
        return parse_json(content.decode("utf-8"), max_depth=max_depth)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from error
