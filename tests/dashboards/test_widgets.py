"""Columns of a long table share its width where several have long texts; otherwise each is as wide as its content."""

import base64
import io
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from html import unescape
from types import SimpleNamespace

import pandas as pd
import panel as pn
import pytest
from bokeh.document import Document
from panel.io.state import set_curdoc
from playwright.sync_api import Browser, WebSocketRoute

from tests.browser import open_page, read_until
from tests.serving import free_port
from workbench.dashboards import widgets
from workbench.dashboards.study_jobs import Answer


def test_two_columns_of_long_texts_share_the_width() -> None:
    rows = pd.DataFrame({"layer": [1, 2], "label": ["a" * 60, "b"], "example": ["<|end|>" + "c" * 90, ""]})
    widths = widgets._shared_width(rows, ["label", "example"])
    assert sum(float(width.rstrip("%")) for width in widths.values()) > 99.5
    assert float(widths["layer"].rstrip("%")) < float(widths["label"].rstrip("%"))
    one = rows.assign(example="c")
    assert widgets._shared_width(one, ["label", "example"]) == {}, "negative control: all fit beside each other"
    numbers = pd.DataFrame({"feature": [1, 2], "largest value": [0.5, 1.5]})
    assert widgets._shared_width(numbers, []) == {"feature": "50.0%", "largest value": "50.0%"}
    formats = widgets._long_table(rows, {}).formatters
    assert (formats["label"]["type"], formats["example"]["type"]) == ("plaintext", "textarea"), "long texts are wrapped"


def test_a_column_of_links_keeps_its_values_and_shows_no_address() -> None:
    """Sorted as text, expert 10 would come before expert 2, and as HTML by the address."""
    rows = pd.DataFrame({"expert": range(30), "load": [0.5] * 30})
    addresses = [f"./experts?expert={n}" for n in range(30)]
    drawn = widgets._long_table(rows, {"expert": addresses})
    assert drawn.value["expert"].tolist() == list(range(30))
    url, text = drawn.hidden_columns
    assert drawn.value[url].tolist() == addresses
    assert drawn.value[text].tolist() == [str(n) for n in range(30)], "the number 0 would be an empty link"
    assert drawn.formatters["expert"] == {"type": "link", "urlField": url, "labelField": text}
    few = widgets._plain_table(rows.head(2), {"expert": ["./a?b=1&c=2", ""]}).object
    assert '<a href="./a?b=1&amp;c=2">0</a>' in few
    assert "<td>1</td>" in few, "without an address there is no link"


def test_a_short_table_is_saved_without_the_server() -> None:
    rows = pd.DataFrame({"token": ['a,"b"', "<b>ü</b>"], "load": [1 / 3, 2.0]})
    shown = widgets.table("Title", rows, 'load of "a"').objects[-1].object
    (name, address), *others = re.findall(r'download="([^"]*)" href="([^"]*)"', shown)
    assert (unescape(name), others) == ('load of "a".csv', [])
    text = base64.b64decode(address.partition("base64,")[2]).decode()
    assert pd.read_csv(io.StringIO(text)).equals(rows)
    formula = pd.DataFrame({"id": ["=1+1"] * 20})  # of a run from elsewhere; spreadsheets would compute it
    assert widgets.table_content(formula, "ids")[-1].callback().read().splitlines() == ["id", *["'=1+1"] * 20]
    assert not pd.read_csv(io.StringIO(text)).equals(rows.round(2)), "negative control: all decimals are there"


def test_deferred_content_comes_after_the_page_and_at_once_on_a_page_that_is_shown() -> None:
    document = Document()
    with set_curdoc(document):
        pn.state._loaded[document] = False  # as of a session whose page is not on the screen
        box = widgets.deferred(lambda: widgets.html("content"))
        assert isinstance(box[0], pn.indicators.LoadingSpinner)
        pn.state._on_load(document)  # what the browser's message calls
        assert box[0].object == "content"
        assert widgets.deferred(lambda: widgets.html("content")).object == "content"
    assert widgets.deferred(lambda: widgets.html("content")).object == "content"  # in a notebook


@pytest.mark.browser
@pytest.mark.parametrize("waits", [True, False])
def test_results_that_come_before_a_page_is_shown_are_put_on_it_afterwards(
    waits: bool, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser has fetched the page and sends late that it shows it. The negative control does not wait for this."""
    if not waits:
        monkeypatch.setattr(widgets, "when_shown", lambda change: change())
    asked, late = list[float](), list[Callable[[], None]]()
    ready = threading.Event()

    def ask() -> Answer:
        asked.append(time.monotonic())
        return Answer({}) if ready.is_set() else Answer()

    def route(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def forward(message: str | bytes) -> None:
            if late or "document_ready" in str(message):
                late.append(partial(server.send, message))
            else:
                server.send(message)

        socket.on_message(forward)

    port = free_port()
    server = pn.serve(
        lambda: widgets.awaited(ask, lambda _: [widgets.html("results")]), port=port, threaded=True, show=False
    )
    try:
        page = open_page(browser)
        page.route_web_socket(re.compile(""), route)
        page.goto(f"http://localhost:{port}")
        page.get_by_text("Running study").wait_for()
        while not late:
            page.wait_for_timeout(50)
        ready.set()
        held = time.monotonic()
        page.wait_for_timeout(2000)
        if not waits:
            read_until(page, lambda: any(moment > held for moment in asked), bool)
        assert any(moment > held for moment in asked) is not waits
        for send in late:
            send()
        if waits:
            page.get_by_text("results").wait_for()
    finally:
        server.stop()


def test_several_reasons_are_a_list_and_one_is_a_sentence() -> None:
    several = widgets.unavailable("No results", "Skipped: a, as <b>. Skipped: c, as d. Skipped: a, as <b>.").object
    assert several.count("<li>") == 2
    assert "<li>A, as &lt;b&gt;.</li>" in several
    assert "No results: the run has 1 effort" in widgets.unavailable("No results", "the run has 1 effort").object


def test_a_failure_to_look_for_results_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    polls, stopped = list[Callable[[], None]](), list[bool]()
    watch = SimpleNamespace(stop=lambda: stopped.append(True))
    monkeypatch.setattr(pn.state, "add_periodic_callback", lambda again, period: polls.append(again) or watch)
    answers: list[Answer | Exception] = [Answer(), RuntimeError("once"), Answer(), Answer({})]

    def ask() -> Answer:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    box = widgets.awaited(ask, lambda results: [widgets.html("results")])
    (again,) = polls
    again()
    again()
    assert stopped == []
    again()
    assert (box[0].object, stopped) == ("results", [True])


def test_a_reason_that_remains_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    polls, stopped = list[Callable[[], None]](), list[bool]()
    watch = SimpleNamespace(stop=lambda: stopped.append(True))
    monkeypatch.setattr(pn.state, "add_periodic_callback", lambda again, period: polls.append(again) or watch)
    answers = iter([Answer()])
    box = widgets.awaited(lambda: next(answers), lambda results: [])
    for _ in range(3):
        polls[0]()
    assert "StopIteration" in box[0].object
    assert stopped == [True]
