"""Progress of long jobs: a bar on a terminal and in a notebook, otherwise a plain line every ten seconds."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

from workbench.counting import plural_or_singular
from workbench.notebook import notebook_display

_NOTEBOOK_INTERVAL_S = 0.2  # between two updates of a bar in a notebook


class Advance(Protocol):
    """A function that is called with the number of units done and, optionally, their bytes."""

    def __call__(self, n: int, size: int = 0, /) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str, detail: Callable[[], str] | None = None) -> Iterator[Advance]:
    """Yield a function that reports how many more `unit`s are done. Only one thread may call it at a time.

    detail: returns what to show in place of units a second; call the function with 0 to show it during a long unit.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if display := notebook_display():
        yield from _notebook_bar(display, label, total, unit, detail)
    elif console.is_terminal:
        yield from _bar(console, label, total, unit, detail)
    else:
        yield from _lines(label, total, unit, detail)


def _bar(console: object, label: str, total: int, unit: str, detail: Callable[[], str] | None) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task(label, total=total, speed="")
        speed = _Speed(total, unit, detail)

        def advance(n: int, size: int = 0, /) -> None:
            speed.add(n, size)
            bar.update(task, advance=n, speed=str(speed))

        yield advance


class _NotebookBar:
    """A bar as HTML, with the same line as plain text for programs that show no HTML. It needs no widgets."""

    def __init__(self, label: str, total: int, unit: str, speed: "_Speed") -> None:
        self._label, self._total, self._unit, self._speed = label, total, unit, speed

    def __repr__(self) -> str:
        done = f"{self._speed.done:,} of {self._total:,} {plural_or_singular(self._total, self._unit)}"
        return f"{self._label}: {done}, {self._speed}{self._speed.left}"

    def _repr_html_(self) -> str:
        bar = f'<progress max="{max(self._total, 1)}" value="{self._speed.done}" style="width:16em"></progress>'
        return f'<div aria-label="{escape(self._label)}">{bar} {escape(repr(self))}</div>'


def _notebook_bar(
    display: Callable[..., Any], label: str, total: int, unit: str, detail: Callable[[], str] | None
) -> Iterator[Advance]:
    """Show a bar below the cell, and update it a few times a second."""
    speed, last = _Speed(total, unit, detail), time.monotonic()
    bar = _NotebookBar(label, total, unit, speed)
    shown = display(bar, display_id=True)

    def advance(n: int, size: int = 0, /) -> None:
        nonlocal last
        speed.add(n, size)
        now = time.monotonic()
        if now - last > _NOTEBOOK_INTERVAL_S:
            last = now
            shown.update(bar)

    try:
        yield advance
    finally:
        shown.update(bar)


def _lines(label: str, total: int, unit: str, detail: Callable[[], str] | None) -> Iterator[Advance]:
    """Print a line when ten seconds have passed, and one at the end."""
    speed, last = _Speed(total, unit, detail), time.monotonic()

    def advance(n: int, size: int = 0, /) -> None:
        nonlocal last
        speed.add(n, size)
        now = time.monotonic()
        if now - last > 10 or speed.done == total:
            last = now
            counted = f"{speed.done:,} of {total:,} {plural_or_singular(total, unit)}"
            print(f"{label}: {counted}, {speed}{speed.left}", file=sys.stderr, flush=True)

    yield advance


class _Speed:
    """Units and bytes a second since the start, and the remaining time at this speed."""

    def __init__(self, total: int, unit: str, detail: Callable[[], str] | None) -> None:
        self._total, self._unit, self._detail, self._begun = total, unit, detail, time.monotonic()
        self.done = self._bytes = 0

    def add(self, n: int, size: int) -> None:
        self.done += n
        self._bytes += size

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begun, 1e-9)

    def __str__(self) -> str:
        written = f", {self._bytes / self._seconds / 1e6:,.1f} MB/s" if self._bytes else ""
        rate = f"{self.done / self._seconds:,.0f} {self._unit}/s{written}"
        return rate if self._detail is None else self._detail()

    @property
    def left(self) -> str:
        seconds = (self._total - self.done) * self._seconds / max(self.done, 1)
        return f", {datetime.timedelta(seconds=round(seconds))} left" if 0 < self.done < self._total else ""
