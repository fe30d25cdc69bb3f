"""A browser for tests of the dashboard: a server as a user starts it, and a page that remembers its complaints."""

import json
import re
import signal
import subprocess
import sys

import pytest

from tests.browser import WAIT_MS, open_page, read_until
from tests.serving import free_port, wait_for

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Frame, Page  # noqa: E402

# names of controls that a screen reader would not find
UNNAMED = """() => { const found = [];
  const text = e => [...e.childNodes, ...(e.shadowRoot ? e.shadowRoot.childNodes : [])].map(
    c => c.nodeType === 3 ? c.data : c.nodeType === 1 ? text(c) : '').join('').trim();
  const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (/^(SELECT|INPUT|BUTTON|TEXTAREA|A|IMG|IFRAME)$/.test(e.tagName) && e.type !== 'hidden'
      && e.getClientRects().length && !e.closest('.js-plotly-plot')) {
    const label = e.getAttribute('aria-label') || e.title || e.alt || e.placeholder || text(e) && e.tagName !== 'SELECT'
      || (e.labels && [...e.labels].some(l => l.textContent.trim()));
    if (!label) found.push(e.tagName); }
  if (e.tabIndex > 0) found.push('tabindex');
  if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return found }"""


def serve(*arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """`workbench dashboard` as a user starts it; returns when it answers."""
    port = free_port()
    command = [sys.executable, "-m", "workbench.cli", "dashboard", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(port, server)
    return server, f"http://localhost:{port}"


def stop(server: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does."""
    server.send_signal(signal.SIGINT)
    assert server.wait(300) in (0, 130)


class Session:
    """A page that remembers what it asked for and complained of."""

    def __init__(self, browser: Browser, url: str, width: int = 1280) -> None:
        self.page: Page = open_page(browser, viewport={"width": width, "height": 900})
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._request)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", self._page_error)
        self.page.goto(url)

    def _page_error(self, error: object) -> None:
        # Panel 1.9 now and then resizes the wrong element while a figure is drawn; it is drawn all the same.
        if "_guiEditing" not in str(error):
            self.errors.append(str(error))

    def _request(self, request: object) -> None:
        url = request.url  # type: ignore[attr-defined]
        if not re.match(r"(http://localhost:|http://127\.0\.0\.1:|ws://localhost:|data:|blob:)", url):
            self.foreign.append(url)

    def drawn(self, count: int = 1) -> "Session":
        """Wait until that many figures are there."""
        self.page.wait_for_function(
            """count => { const all = []; const walk = root => { for (const e of root.querySelectorAll('*')) {
                 if (e.classList.contains('js-plotly-plot') && e.querySelector('.main-svg')) all.push(e);
                 if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return all.length >= count }""",
            arg=count,
            polling=200,  # ms; the default is each frame, and walks through all elements as often
            timeout=WAIT_MS,
        )
        return self


# the numbers of the drawn heat map of this name as JSON, and null until it is drawn
_HEAT = """name => { let drawn = null; const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (e.classList.contains('js-plotly-plot') && e.layout?.meta === name && e.querySelector('.main-svg')) {
    const t = (e.data || []).find(t => t.type === 'heatmap'); if (t) drawn = JSON.stringify(t.z._inputArray || t.z); }
  if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return drawn }"""


def heat(page: Page, name: str) -> list[list[float]]:
    """The numbers of the heat map of this name, as the browser holds them, when it is drawn.

    Another selection draws a new figure, which comes after its address.
    """
    values = read_until(page, lambda: page.evaluate(_HEAT, name), lambda text: text is not None)
    return json.loads(values)  # type: ignore[no-any-return]


def frame_of(session: Session, drawn: str = ".t") -> Frame:
    """The frame of a page when it has such elements: tokens of a conversation, if nothing else is given."""

    def read() -> Frame | None:
        frames = [f for f in session.page.frames if f != session.page.main_frame]
        return frames[0] if frames and frames[0].locator(drawn).count() else None

    frame = read_until(session.page, read, lambda frame: frame is not None)
    assert frame is not None
    return frame
