"""A headless Chromium for tests of pages.

Debian's `chromium-headless-shell` is preferred where it is installed: the same engine without the browser's own window,
which costs a third of the processor time of a page.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

WAIT_MS = 300_000  # five seconds and half a minute, the defaults, are too few on a busy machine
expect.set_options(timeout=WAIT_MS)
T = TypeVar("T")
_COMMANDS = ("chromium-headless-shell", "chromium", "chromium-browser")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
def launched() -> Iterator[Browser]:
    """Yield a headless Chromium. Only one may run in a process at a time: use it in fixtures of a module."""
    path = next(filter(None, map(shutil.which, _COMMANDS)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


def open_page(browser: Browser, **options: Any) -> Page:
    """Return a new page whose actions wait as long as `expect` does."""
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT_MS)
    return page


def read_until(page: Page, read: Callable[[], T], holds: Callable[[T], bool]) -> T:
    """Return the first value for which `holds` is true.

    What a page shows comes in several messages of its server, so that a value that is read once may be one too early.

    Raises:
        AssertionError: no value was right for five minutes; the last one is named.
    """
    value: T | Error
    for _ in range(WAIT_MS // 250):
        try:
            value = read()
            if holds(value):
                return value
        except Error as error:  # a frame that was replaced meanwhile, a figure that is not drawn yet
            value = error
        page.wait_for_timeout(250)
    raise AssertionError(f"the value does not become right; the last one is {value!r}")


def expect_value(page: Page, read: Callable[[], T], wanted: T) -> None:
    """Wait until `read` returns this value.

    Raises:
        AssertionError: it did not within five minutes; the last one is named.
    """
    read_until(page, read, lambda value: value == wanted)
