"""Inputs: the files and pipes that a command may read.

A device has no end, and a named pipe to which no process writes never has a beginning: both are refused. A pipe can be
read once only, so its content is copied to a temporary file.
"""

import errno
import os
import select
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from workbench.errors import InputError

WRITER_TIMEOUT_S = 10.0  # within which a named pipe must have a writer
MAX_PIPE_BYTES = 16 * 2**30
_CHUNK_BYTES = 2**20
_ANONYMOUS = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")


@contextmanager
def regular_file(path: str | Path) -> Iterator[Path]:
    """Yield a regular file with the content of `path`: the file itself, or a copy of what a pipe gives.

    Raises:
        InputError: it is a folder, a device, a socket or a pipe without a writer, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; give a file")
    if stat.S_ISREG(mode):
        yield Path(path)
        return
    refuse_devices(path)
    with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as copy:
        try:
            with os.fdopen(_open_pipe(path), "rb") as pipe:
                _copy(path, pipe, copy)
            copy.flush()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        yield Path(copy.name)


def _copy(path: str | Path, pipe: BinaryIO, copy: IO[bytes]) -> None:
    """Copy what a pipe gives, which may never end.

    Raises:
        InputError: it gives more than `MAX_PIPE_BYTES`.
    """
    size = 0
    while chunk := pipe.read(_CHUNK_BYTES):
        size += len(chunk)
        if size > MAX_PIPE_BYTES:
            raise InputError(f"{path} is a pipe that gives more than {MAX_PIPE_BYTES:,} bytes; give a file")
        copy.write(chunk)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, without waiting for a pipe or reading a device.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))


def refuse_devices(path: str | Path) -> None:
    """Check that a path is neither a device nor a socket; a missing path is an error when it is opened.

    Raises:
        InputError: it is one.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISFIFO(mode)):
        raise InputError(f"{path} is a {'socket' if stat.S_ISSOCK(mode) else 'device'}; give a file")


def _open_pipe(path: str | Path) -> int:
    """Return a descriptor of a pipe that has a writer."""
    if str(path).startswith(_ANONYMOUS):  # as in <(zcat rows.jsonl.gz): its writer exists
        return os.open(path, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(WRITER_TIMEOUT_S * 1000):
        os.close(descriptor)
        raise InputError(f"{path} is a pipe to which nothing was written for {WRITER_TIMEOUT_S:.0f} s: give a file")
    os.set_blocking(descriptor, True)
    return descriptor
