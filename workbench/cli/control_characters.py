"""Show control characters as escapes: a text of a run or of a host must not command the terminal.

Sequences of a terminal can set the clipboard or the title, or overwrite what was printed. The colours of tables and
help texts pass, and on standard error what moves the cursor, as progress bars do.

Reference: CWE-150; ECMA-48 for control sequences.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_ALL = re.compile(_CONTROL)
_BUT_COLOURS = re.compile(f"(?P<passes>\x1b\\[[0-9;]*m)|{_CONTROL}")
_BUT_CURSOR = re.compile(f"(?P<passes>\x1b\\[[0-9;?]*[A-Za-z]|\r)|{_CONTROL}")


def visible(text: str) -> str:
    """Return a text in which every control character but a tab and a line end is an escape such as \\x1b."""
    return _ALL.sub(_escape, text)


def _escape(control: re.Match[str]) -> str:
    return control.groupdict().get("passes") or f"\\x{ord(control[0]):02x}"


class _Filtered:
    """A text stream that writes control characters as escapes, but for what a pattern has besides them."""

    def __init__(self, stream: Any, pattern: re.Pattern[str]) -> None:
        self._stream, self._pattern = stream, pattern

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._stream.write(self._pattern.sub(_escape, text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def visible_controls() -> Iterator[None]:
    """Filter what the block writes to standard output and standard error."""
    before = sys.stdout, sys.stderr
    sys.stdout = before[0] and _Filtered(before[0], _BUT_COLOURS)
    sys.stderr = before[1] and _Filtered(before[1], _BUT_CURSOR)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
