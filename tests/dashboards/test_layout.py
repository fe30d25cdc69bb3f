"""The frame of a page shows text of a run as text only."""

import re
import shutil
import threading
from pathlib import Path

import panel as pn
import pytest
from bokeh.document import Document
from bokeh.models import ImportedStyleSheet
from panel.io.state import set_curdoc
from playwright.sync_api import Browser

from tests.browser import open_page
from tests.conftest import DATA
from tests.serving import free_port
from workbench.dashboards import app, layout
from workbench.dashboards.layout import GROUPS, missing_page, navigation
from workbench.dashboards.pages import page_titles
from workbench.dashboards.state import RunRegistry
from workbench.registry import studies


def test_a_run_name_is_only_text_in_the_template(tmp_path: Path) -> None:
    """Panel's template puts the title into the page as it is: `<img onerror=…>` once ran there."""
    path = tmp_path / "<img src=x onerror=alert(1)>.zarr"
    shutil.copytree(DATA / "demo.zarr", path)
    registry = RunRegistry([path])
    (name,) = registry.names
    template = app._template(registry, "overview")
    assert "<" in name, "otherwise the test proves nothing"
    assert "<" not in template.title
    assert "&lt;img" in template.title
    assert "<" not in template.texts["run_name"]


def test_the_page_for_an_unknown_address_links_to_the_pages() -> None:
    text = missing_page({"overview": "Overview", "a&b": "<script>"})
    assert '<a href="/overview">' in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_the_navigation_has_every_page_once_under_a_heading() -> None:
    titles = page_titles() | {"live": "Live", "of-another": "<b>Another"}
    text = navigation("experts", titles, {"features"})
    for path in titles:
        assert text.count(f'data-page="{path}"') == 1, path
    assert text.count("aria-current=page") == 1
    assert text.count("wb-absent") == 1
    assert text.index("More studies") < text.index("&lt;b&gt;Another"), "a page that no group names"
    linked = {path for paths in GROUPS.values() for path in paths}
    assert linked - {"live"} <= set(page_titles()), "every page of a group exists"
    assert navigation("experts", {"experts": "Experts"}).count("<h2>") == 1, "no heading without a page"


def unknown_pages(text: str) -> list[str]:
    """Return the names of pages in a document that no page has."""
    mentioned = re.findall(r"\bpages? \*([^*\n]+)\*", text)
    return sorted(set(mentioned) - {*page_titles().values(), "Live"})


def test_a_page_has_one_name_in_the_navigation_the_report_and_the_documents() -> None:
    titles = page_titles()
    first: dict[str, str] = {}
    for record in studies():  # the report names its sections after them
        first.setdefault(record.page or record.name, record.title)
    assert first == {page: titles[page] for page in first}
    root = Path(__file__).parents[2]
    documents = [root / "README.md", *(root / "docs").rglob("*.md")]
    assert sum("page *" in path.read_text() for path in documents) > 1
    assert {path.name: unknown_pages(path.read_text()) for path in documents if unknown_pages(path.read_text())} == {}
    assert unknown_pages("the page *Reasoning effort* shows") == ["Reasoning effort"], "negative control"


def styles_from_other_hosts(registry: RunRegistry) -> set[str]:
    """Return the addresses on other hosts of the style sheets of a session for which no HTML was written."""
    pn.extension("plotly", "tabulator", notifications=False, inline=True)
    document = Document()
    with set_curdoc(document):
        app._template(registry, "transcript").server_doc(document, location=False)
    sheets = [sheet for root in document.roots for sheet in root.select({"type": ImportedStyleSheet})]
    assert sheets
    return {sheet.url for sheet in sheets if "://" in sheet.url}


def test_a_session_without_html_loads_its_styles_from_this_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser that connects after its session expired gets such a session; tables once had no style then."""
    registry = RunRegistry([DATA / "demo.zarr"])
    try:
        assert styles_from_other_hosts(registry) == set()
        monkeypatch.setattr(layout, "_load_styles_from_this_server", lambda: None)
        assert styles_from_other_hosts(registry), "negative control: without the address they are Panel's"
    finally:
        registry.jobs.close()


@pytest.mark.browser
def test_a_page_is_busy_until_its_own_server_work_is_done(browser: Browser) -> None:
    """Panel's indicator would be switched on every page of the server, by every session (the second page)."""
    running, finish = threading.Event(), threading.Event()

    def page() -> layout.PageTemplate:
        def work(_: object) -> None:
            running.set()
            finish.wait(600)

        button = pn.widgets.Button(label="Work", on_click=work)
        return layout.page_template("experts", {"experts": "Experts"}, "demo", sidebar=[], main=[button])

    port = free_port()
    server = pn.serve(page, port=port, threaded=True, show=False)
    try:
        first, second = open_page(browser), open_page(browser)
        for one in (first, second):
            one.goto(f"http://localhost:{port}")
            one.get_by_role("button", name="Work").wait_for()
            one.wait_for_function("!document.documentElement.matches('.wb-waits')")
        first.get_by_role("button", name="Work").click()
        first.locator("html.wb-waits").wait_for()
        assert running.wait(300)
        assert second.locator("html.wb-waits").count() == 0
        finish.set()
        first.wait_for_function("!document.documentElement.matches('.wb-waits')")
    finally:
        finish.set()
        server.stop()
