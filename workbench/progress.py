"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Yields a function to call with how many more `unit`s are done."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        yield from _bar(console, label, total, unit)
    else:
        yield from _lines(label, total, unit)


def _bar(console: object, label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    """A line at the start of work worth waiting for, then every ten seconds, and one at the end."""
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last > 10 or done == total:
            last = now
            rate = done / max(now - start, 1e-9)
            print(f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s", file=sys.stderr, flush=True)

    yield advance
