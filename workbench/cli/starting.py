"""Ctrl-C before the command line is loaded, which takes part of a second: one line instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COMMANDS = ("workbench", "-m")  # sys.argv[0] of the programs whose start this is; others import the command line


@contextmanager
def interrupted_in_one_line() -> Iterator[None]:
    """End a command that Ctrl-C stops within the block with the exit code 130 and one line."""
    try:
        yield
    except KeyboardInterrupt:
        if Path(sys.argv[0]).stem not in _COMMANDS:
            raise
        print("workbench: interrupted before the command began; nothing was written", file=sys.stderr)
        sys.exit(130)
