"""Python child processes that import nothing from the current folder.

`python -m` and `python -c` put the current folder first on `sys.path`, so a `numpy.py` or `pickle.py` that somebody
else left there would be executed. Every child process of the workbench is started by one of these two.

Reference: the option -P and PYTHONSAFEPATH of Python 3.11.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SAFE_PATH = "PYTHONSAFEPATH"
_users = 0
_before: str | None = None
_lock = threading.Lock()


def python(*arguments: str) -> list[str]:
    """Return a command that runs this Python with these arguments, without the current folder on its path."""
    return [sys.executable, "-P", *arguments]


@contextmanager
def isolated_children() -> Iterator[None]:
    """Start the processes of multiprocessing, concurrent.futures and dask in this block in the same way."""
    global _users, _before  # noqa: PLW0603  the environment is one for all threads
    with _lock:
        if not _users:
            _before = os.environ.get(_SAFE_PATH)
            os.environ[_SAFE_PATH] = "1"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                os.environ.pop(_SAFE_PATH)
                if _before is not None:
                    os.environ[_SAFE_PATH] = _before
