"""Files with changed bytes or headers, and devices, pipes or links instead of files, within a context."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(path.parent):
        end.bind(path.name)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": make_pipe,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "folder": lambda path: path.mkdir(),
    "absurd size": make_sparse,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"\xff\x00{" * 50),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "missing": lambda path: None,
}


@contextlib.contextmanager
def replaced(path: Path, kind: str) -> Iterator[None]:
    """Replace a file by something else while the block runs; readers that wait for a pipe are released."""
    content = path.read_bytes()
    path.unlink()
    SPECIAL[kind](path)
    try:
        yield
    finally:
        if kind == "pipe":
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def written(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content, for as long as the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file whose header is changed."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def damaged_bytes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a function that cuts a file, or changes some of its bytes, most of them near its start."""
    cut = draw(st.booleans())
    places = draw(st.lists(st.integers(0, 200) | st.integers(0, 2**21), min_size=1, max_size=4))
    values = draw(st.binary(min_size=4, max_size=4))

    def damage(content: bytes) -> bytes:
        if cut:
            return content[: places[0] % len(content)]
        changed = bytearray(content)
        for place, value in zip(places, values, strict=False):
            changed[place % len(content)] = value
        return bytes(changed)

    return damage
