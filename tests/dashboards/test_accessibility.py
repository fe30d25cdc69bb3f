"""Every page opens under its title, without a complaint, and axe-core finds no serious or critical violation on it.

`pytest tests/dashboards/test_accessibility.py --long` looks at all pages in both themes; the default suite at three.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboards.browsing import Session
from workbench.dashboards.pages import page_titles

axe = pytest.importorskip("axe_playwright_python")
playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Frame, expect  # noqa: E402

pytestmark = pytest.mark.browser

SOURCE = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
# Tabulator draws its own table: a grid that contains a scrolled element and buttons, which ARIA does not allow
RUN = """async rules => (await axe.run({exclude: [".tabulator"]}, {iframes: false, resultTypes: ["violations"],
  ...(rules.length ? {runOnly: rules} : {})})).violations.filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => v.id + ": " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 120)).join(" "))"""
FEW = ("overview", "transcript", "causal")


def violations(frame: Frame, rules: list[str]) -> list[str]:
    frame.evaluate(SOURCE)
    found: list[str] = frame.evaluate(RUN, rules)
    return found


def opened(session: Session, url: str, title: str) -> Iterator[Frame]:
    """The page and the frames in it, when nothing is loading any more."""
    session.page.goto(url, timeout=90_000)
    expect(session.page.get_by_role("heading", name=title, level=1)).to_be_visible()
    expect(session.page.get_by_text("The result will be cached")).to_have_count(0, timeout=300_000)
    session.page.wait_for_timeout(700)
    yield from session.page.frames


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_have_no_serious_violation(demo: str, browser: Browser, theme: str, long: bool) -> None:
    session = Session(browser, f"{demo}/overview?theme={theme}")
    titles: dict[str, Any] = page_titles()
    rules = [] if theme == "light" else ["color-contrast"]  # the rest does not depend on the theme
    for page in titles if long else FEW:
        for frame in opened(session, f"{demo}/{page}?theme={theme}&sequence=2", titles[page]):
            assert violations(frame, rules) == [], (page, frame.url)
    assert session.errors == session.foreign == []
    session.page.evaluate(
        """() => { const bad = document.createElement("p"); bad.textContent = "faint"; bad.style.color = "#888";
                   bad.style.background = "#999"; document.querySelector("main").prepend(bad); }"""
    )
    assert any(text.startswith("color-contrast") for text in violations(session.page.main_frame, rules)), (
        "negative control: a text without contrast"
    )
