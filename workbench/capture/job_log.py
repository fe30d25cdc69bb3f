"""The log of a capture job: a file beside the run, to which every unit that is committed adds a line."""

import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.capture.compute import Computed
from workbench.errors import InputError, JobError
from workbench.outputs import check_output, made_parents

log = logging.getLogger("workbench.capture")
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")


class CommittedUnits:
    """Counts and logs units that are committed; they come from several threads."""

    def __init__(self, advance: Any, of: int) -> None:
        self._advance, self._of, self._lock = advance, of, threading.Lock()
        self.units = 0

    @contextmanager
    def failure_logged(self, path: str | Path, of: int) -> Iterator[None]:
        """Add to the log what ends the job early, and how many units of those to go were committed."""
        try:
            yield
        except BaseException as error:
            log.error("%s: %s after %d of %d units", path, one_line(error), self.units, of)
            raise

    def unit(self, computed: Computed, seconds: float) -> None:
        """Count a unit that this process computed."""
        size = sum(v.nbytes for v in (*computed.tokens.values(), *computed.records.values()))
        self.committed(computed.unit.index, len(computed.tokens["id"]), size, seconds)

    def committed(self, index: int, tokens: int, size: int, seconds: float) -> None:
        """Count a unit by its number, tokens, bytes before compression and seconds."""
        with self._lock:
            self.units += 1
            self._advance(tokens, size)
        rate, speed = tokens / seconds, size / seconds / 1e6
        log.info(
            "unit %d of %d: %d tokens in %.1f s, %.0f tokens/s, %.1f MB/s",
            index,
            self._of,
            tokens,
            seconds,
            rate,
            speed,
        )


def log_path(path: str | Path, file: str | Path | None, inputs: Sequence[str | Path]) -> Path | None:
    """Return the file to log to: the one that was asked for, or one beside a local run.

    Raises:
        InputError: it is something that no job logged to, or is inside the run.
    """
    if file is None and "://" in str(path):
        return None
    target = Path(file) if file is not None else Path(f"{str(path).rstrip('/')}.log")
    real, run = Path(os.path.realpath(target)), Path(os.path.realpath(path))
    if "://" not in str(path) and (real == run or run in real.parents):
        raise InputError(f"--log {target} is inside the run {path}: choose a file outside of it")
    return check_output(target, command="capture", inputs=inputs, overwrite=True, owned=_is_log)


def _is_log(path: Path) -> bool:
    """Return whether a file is empty or begins as the log of a job does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(200)
    return not start or _LOG_LINE.match(start) is not None


@contextmanager
def logged(target: Path | None) -> Iterator[None]:
    """Write what is logged in the block to the end of a file, a line each; to none for None.

    A job that is refused leaves no new file; one that stops leaves it, with the reason.
    """
    if target is None:
        yield
        return
    is_new = not target.exists()
    with made_parents(target):
        handler = logging.FileHandler(target, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        if is_new and not isinstance(error, JobError):
            target.unlink(missing_ok=True)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


def one_line(error: BaseException) -> str:
    """Return the type and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
