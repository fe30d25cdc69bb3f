"""One browser for the tests of a module, and one server of the demo run for those of the package."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import launched
from tests.dashboards.browsing import Browser, serve, stop


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as chromium:
        yield chromium


@pytest.fixture(autouse=True)
def _closed_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close the pages of a test at its end: an open page is drawn and asked for news as long as the browser runs."""
    browsers = [request.getfixturevalue("browser")] if "browser" in request.fixturenames else []
    yield
    for used in browsers:
        for context in used.contexts:
            context.close()


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory, demo_run: Path) -> Iterator[str]:
    server, url = serve(str(demo_run))
    yield url
    stop(server)
