"""A headless Chromium for tests of pages.

Debian's `chromium-headless-shell` is preferred where it is installed: the same engine without the browser's own window,
which costs a third of the processor time of a page.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

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
