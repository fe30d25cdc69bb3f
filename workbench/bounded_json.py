"""JSON from outside this process, read with limits of size and depth.

Everything that comes from a file, a host or a user is read here. A test lists the modules that may use `json.loads`.
"""

import json
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workbench.errors import InputError, refuse_lfs_pointer

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(
    text: str | bytes,
    *,
    max_depth: int = MAX_DEPTH,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON text; bytes are UTF-8. object_pairs_hook: makes a value of the pairs of each object.

    Raises:
        InputError: it is not JSON in UTF-8, or nests lists and objects deeper than `max_depth`.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    refuse_deep(text, max_depth)
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except InputError:  # of the hook
        raise
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as `object_pairs_hook`: JSON leaves open which of two equal names counts.

    Raises:
        InputError: a name is there twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"an object has the name {ascii(twice)[:60]} twice: keep one of them")
    return value


def parse_documents(
    text: str,
    *,
    max_depth: int = MAX_DEPTH,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Iterator[Any]:
    """Yield the values of JSON documents that follow each other, separated by spaces, line ends or commas.

    Raises:
        InputError: what follows is not JSON, or the text nests lists and objects deeper than `max_depth`.
    """
    refuse_deep(text, max_depth)
    decoder, at = json.JSONDecoder(object_pairs_hook=object_pairs_hook), _document_start(text, 0)
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"not JSON: {error}") from error
        yield value
        at = _document_start(text, at)


def refuse_deep(text: str, max_depth: int = MAX_DEPTH) -> None:
    """Check that a JSON text nests lists and objects to at most `max_depth` levels.

    Raises:
        InputError: it nests them deeper.
    """
    if text.count("[") + text.count("{") <= max_depth:  # most rows: counting is ten times as fast as matching
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match.group()
        depth += (token in "[{") - (token in "]}")
        if depth > max_depth:
            raise InputError(f"invalid JSON: lists and objects are nested deeper than {max_depth} levels")


def read_json(
    path: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON file in UTF-8; no more than `max_bytes` of it are read.

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
    return parse_json(content, max_depth=max_depth, object_pairs_hook=object_pairs_hook)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from error


def _document_start(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
