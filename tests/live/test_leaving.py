"""A closed browser tab ends its request, in a dashboard with the live page; a real browser opens and closes the tab."""

import time
from collections.abc import Generator, Iterator

import panel as pn
import pytest
import torch

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, expect

import workbench as wb
from tests.browser import launched
from tests.conftest import DATA
from tests.serving import free_port
from workbench.dashboards.app import pages
from workbench.dashboards.state import RunRegistry
from workbench.live import app
from workbench.live.job_queue import Job, State
from workbench.live.model_server import Limits, ModelServer, Viewer
from workbench.live.page import LivePage

pytestmark = pytest.mark.browser


class Dashboard:
    """A dashboard with the live page, served in this process; `opened` are the live pages of all sessions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = ModelServer(wb.load("nano", dtype=torch.float32), "nano", Limits(max_seconds=3_000))
        self.opened: list[LivePage] = []
        opened = self.opened

        class Noted(LivePage):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments)  # type: ignore[arg-type]
                opened.append(self)

        monkeypatch.setattr(app, "LivePage", Noted)
        pn.extension("plotly", "tabulator", notifications=False, inline=True)
        registry, port = RunRegistry([DATA / "demo.zarr"]), free_port()
        options = {"websocket_origin": f"localhost:{port}", "threaded": True}
        made = pages(registry, {"live": app.dashboard_page(self.server)})
        self.panel = pn.serve(made, port=port, show=False, verbose=False, **options)
        self.url = f"http://localhost:{port}"

    def close(self) -> None:
        self.panel.stop()
        self.server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as made:
        yield made


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    made = Dashboard(monkeypatch)
    yield made
    made.close()


def endless() -> Generator[None, None, None]:
    while True:
        time.sleep(0.01)
        yield


def job_of_a_closed_tab(dashboard: Dashboard, browser: Browser, *, open_s: float) -> Job:
    """Open the dashboard, go to the live page, start a request that never ends, and close the tab after this time."""
    tab = browser.new_page()
    tab.goto(f"{dashboard.url}/overview", timeout=120_000)
    tab.get_by_role("link", name="Live", exact=True).click(timeout=120_000)
    expect(tab.get_by_label("User message")).to_be_visible(timeout=120_000)
    (page,) = dashboard.opened
    job = dashboard.server.queue.submit(page.viewer.id, endless())
    until(lambda: job.state is State.RUNNING)
    time.sleep(open_s)
    assert job.state is State.RUNNING
    tab.close()
    return job


def until(condition: object) -> None:
    for _ in range(6000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    pytest.fail("nothing happened for ten minutes")


@pytest.mark.slow
def test_a_closed_tab_ends_its_request(dashboard: Dashboard, browser: Browser) -> None:
    # longer than a browser may be away: it is the tab that keeps the request
    job = job_of_a_closed_tab(dashboard, browser, open_s=8)
    assert job.ended.wait(120)
    assert job.state is State.CANCELLED


@pytest.mark.slow
def test_without_the_call_at_its_end_a_session_would_go_on(
    dashboard: Dashboard, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control: leaving is noticed, but does nothing."""
    left: list[Viewer] = []

    def notice(viewer: Viewer) -> None:
        left.append(viewer)

    monkeypatch.setattr(Viewer, "leave", notice)
    job = job_of_a_closed_tab(dashboard, browser, open_s=0.5)
    until(lambda: bool(left))
    time.sleep(1)
    assert job.state is State.RUNNING
