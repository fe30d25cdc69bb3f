"""Compile loops with numba, for this processor, and keep them on disk.

numba's cache compares the age of the file that holds a loop, not of the files from which the loop takes functions and
constants. The name of a loop in the cache therefore contains a digest of every source in its folder: a loop that any of
them has changed is compiled again.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types


@functools.cache
def sources_digest(folder: Path) -> str:
    """Return a digest of the Python sources in a folder, read once a process."""
    sources = ((path.name.encode(), path.read_bytes()) for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(name + b"\0" + text for name, text in sources)).hexdigest()[:16]


def compile_loop(loop: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """Return a loop compiled for arguments of these types of numba: from the cache on disk if it has it."""
    loop.__qualname__ = f"{loop.__name__}_{sources_digest(Path(inspect.getfile(loop)).parent)}"
    signature = types.void(*arguments)
    try:
        return njit(signature, nogil=True, cache=True)(loop)
    except (RuntimeError, OSError):  # no folder for the cache can be written
        return njit(signature, nogil=True)(loop)
