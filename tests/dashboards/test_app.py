"""The dashboard in a real browser: what is drawn, what a link reopens, that nothing is fetched from elsewhere.

Also tests `workbench.dashboards.heatmap_pages`.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import panel
import pytest

from tests.browser import expect_value, open_page, read_until
from tests.cli.running import run_command
from tests.dashboards.browsing import UNNAMED, Session, frame_of, heat, serve, stop
from tests.runs.conftest import make_older
from tests.serving import free_port, wait_for
from workbench.dashboards import app as dashboard

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, expect  # noqa: E402

pytestmark = pytest.mark.browser


def test_the_page_draws_the_study_without_errors_or_requests_to_other_hosts(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts").drawn(2)
    expect(session.page.get_by_role("heading", name="Experts", level=1)).to_be_visible()
    expect(session.page.get_by_text("16 experts").first).to_be_visible()
    for words in ("Findings", "Methods"):
        expect(session.page.get_by_text(words).first).to_be_attached()
    assert session.foreign == []
    assert session.errors == []


def test_it_is_readable_on_a_wide_screen(demo: str, browser: Browser) -> None:
    """Nothing is wider than the window; the negative control is a page that is."""
    session = Session(browser, f"{demo}/experts", width=1920).drawn(2)
    expect_value(session.page, lambda: session.page.evaluate("document.documentElement.scrollWidth"), 1920)
    session.page.add_style_tag(content="body { min-width: 3000px }")
    expect_value(session.page, lambda: session.page.evaluate("document.documentElement.scrollWidth"), 3000)
    assert session.errors == []


def test_choosing_an_effort_changes_the_heat_map_and_the_link_reopens_it(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts?channel=final&effort=high").drawn()
    before = heat(session.page, "demo-relative-final-high-all")
    session.page.get_by_role("button", name="low", exact=True).click()
    session.page.wait_for_url(re.compile("effort=low"))
    after = heat(session.page, "demo-relative-final-low-all")
    assert after != before
    again = Session(browser, session.page.url)
    assert heat(again.page, "demo-relative-final-low-all") == after
    assert session.errors == again.errors == []


def test_a_link_that_names_what_does_not_exist_opens_all_the_same(demo: str, browser: Browser) -> None:
    session = Session(
        browser, f"{demo}/experts?run=../../etc/passwd&channel=<script>alert(1)</script>&effort=extreme"
    ).drawn()
    assert "passwd" not in session.page.content()
    assert session.errors == []


@pytest.fixture(scope="module")
def three_runs(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A dashboard of evil.zarr, whose checkpoint calls itself <script>, demo.zarr and gone.zarr; and their folder."""
    folder = tmp_path_factory.mktemp("runs")
    evil, gone = (shutil.copytree(demo_run, folder / name) for name in ("evil.zarr", "gone.zarr"))
    attributes = json.loads((evil / "zarr.json").read_text())
    attributes["attributes"]["checkpoint"]["name"] = (
        "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
    )
    (evil / "zarr.json").write_text(json.dumps(attributes))
    make_older(evil)  # the checksums of a newer run would show that its attributes were changed
    server, url = serve(str(evil), str(demo_run), str(gone))
    yield url, folder
    stop(server)


def test_text_from_a_run_is_text(three_runs: tuple[str, Path], browser: Browser) -> None:
    """A checkpoint that calls itself <script> must not run."""
    session = Session(browser, three_runs[0]).drawn()
    assert session.page.evaluate("window.evil") is None
    assert session.foreign == []


def test_a_deleted_run_is_named_as_missing(three_runs: tuple[str, Path], browser: Browser) -> None:
    url, folder = three_runs
    shutil.rmtree(folder / "gone.zarr")
    session = Session(browser, f"{url}/overview?run=gone")
    expect(session.page.get_by_text("gone.zarr does not exist").first).to_be_visible()


@pytest.mark.parametrize(
    ("page", "figures", "theme"),
    [
        ("overview", 1, "light"),
        ("sinks", 3, "light"),
        ("channels", 3, "light"),
        ("effort", 2, "light"),
        ("experts", 2, "dark"),
    ],
)
def test_every_page_shows_its_figures_and_methods(
    demo: str, browser: Browser, page: str, figures: int, theme: str
) -> None:
    session = Session(browser, f"{demo}/{page}?theme={theme}").drawn(figures)
    paper = """() => { let found = ''; const walk = root => { for (const e of root.querySelectorAll('*')) {
         if (e.classList.contains('js-plotly-plot')) found = e.layout.template.layout.paper_bgcolor;
         if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return found }"""
    expect_value(session.page, lambda: session.page.evaluate(paper), {"light": "#ffffff", "dark": "#14171c"}[theme])
    words = "Accuracy vs. reasoning length" if page == "overview" else "Methods"
    expect(session.page.get_by_text(words).first).to_be_attached()
    assert session.foreign == []
    assert session.errors == []


def test_another_figure_is_in_the_link_and_its_numbers_can_be_had(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/sinks?figure=position_layer_1").drawn(3)
    expect(session.page.get_by_text("Sink attention by position, layer 1").first).to_be_visible()
    session.page.locator("select").last.select_option(label="Analysis vs. final, at equal position")
    session.page.wait_for_url(re.compile("figure=analysis_vs_final_matched"))
    expect(session.page.get_by_text("within prompts, at equal position").first).to_be_visible()

    def download_numbers() -> list[str]:
        with session.page.expect_download() as download:
            session.page.get_by_text("numbers as CSV").last.click()
        return Path(download.value.path()).read_text().splitlines()

    lines = read_until(session.page, download_numbers, lambda lines: lines[0].startswith("layer,head,"))
    assert len(lines) == 1 + 4 * 8
    assert session.errors == []


def test_back_and_forward_change_the_page(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts?channel=final&effort=high").drawn()
    before = heat(session.page, "demo-relative-final-high-all")
    session.page.get_by_role("button", name="low", exact=True).click()
    session.page.wait_for_url(re.compile("effort=low"))
    expect(session.page.get_by_text("uniform: final, low").first).to_be_visible()
    after = heat(session.page, "demo-relative-final-low-all")
    assert after != before
    session.page.go_back()
    session.page.wait_for_url(re.compile("effort=high"))
    expect(session.page.get_by_text("uniform: final, high").first).to_be_visible()
    assert heat(session.page, "demo-relative-final-high-all") == before
    session.page.go_forward()
    session.page.wait_for_url(re.compile("effort=low"))
    expect(session.page.get_by_text("uniform: final, low").first).to_be_visible()
    assert heat(session.page, "demo-relative-final-low-all") == after
    assert session.errors == []


def test_from_a_cell_to_the_token_of_an_example(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts?channel=analysis")
    heat(session.page, "demo-relative-analysis-all-all")
    session.page.evaluate(
        """() => { let found = null; const walk = root => { for (const e of root.querySelectorAll('*')) {
             if (e.classList.contains('js-plotly-plot') && e.layout.meta.startsWith('demo-relative-')) found = e;
             if (e.shadowRoot) walk(e.shadowRoot); } };
           walk(document);
           found.emit('plotly_click', {points: [{x: 5, y: 1, curveNumber: 0, pointNumber: [1, 5]}]}) }"""
    )
    expect(session.page.get_by_role("heading", name="Layer 1, expert 5")).to_be_visible()
    session.page.wait_for_url(re.compile("expert=5"))
    link = session.page.locator("a[href*='transcript'][href*='pin=']").first
    address = dict(parse_qsl(urlsplit(link.get_attribute("href") or "").query))
    link.click()
    frame = frame_of(session)
    choices = "[String(pinned), $('by').value, $('layer').value, $('expert').value]"
    expect_value(session.page, lambda: frame.evaluate(choices), [address["pin"], "expert", "1", "5"])
    assert frame.evaluate("experts(1, pinned).includes(5)"), "the example was routed to the expert"
    expect(frame.locator(".t.pin")).to_have_count(1)
    frame.locator("#by").select_option("surprisal")
    session.page.wait_for_url(re.compile("colour=surprisal"))
    assert session.errors == []


def test_every_control_and_picture_of_a_page_has_a_name(demo: str, browser: Browser) -> None:
    """What a screen reader needs: names of controls, one main heading, a language, no positive tab index."""
    session = Session(browser, f"{demo}/experts").drawn()
    expect_value(session.page, lambda: session.page.evaluate(UNNAMED), [])
    expect(session.page.locator("h1")).to_have_count(1)
    assert session.page.evaluate("document.documentElement.lang") == "en"
    session.page.evaluate("document.body.append(document.createElement('select'))")
    reported = session.page.evaluate(UNNAMED)
    assert reported == ["SELECT"], "negative control: one without a name"


def test_a_password_file_requires_a_password(demo_run: Path, tmp_path: Path, browser: Browser) -> None:
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"ada": "lovelace"}))
    users.chmod(0o600)
    server, url = serve(str(demo_run), "--basic-auth", str(users))
    try:
        page = open_page(browser)
        page.goto(f"{url}/overview")
        assert "Tokens by channel" not in page.content()
        page.fill("input[name=username]", "ada")
        page.fill("input[name=password]", "lovelace")
        page.locator("button, input[type=submit]").first.click()
        expect(page.get_by_text("Tokens by channel and effort").first).to_be_visible()
    finally:
        stop(server)


def test_an_expert_s_page_is_in_the_link(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts?channel=analysis&layer=1&expert=5").drawn(2)
    expect(session.page.get_by_text("Layer 1, expert 5").first).to_be_visible()
    expect(session.page.get_by_text("Over-represented tokens").first).to_be_attached()
    session.page.get_by_text("Co-activation and transitions").first.click()
    session.drawn(4)
    expect(session.page.get_by_text("From layer 1 to 2: analysis").first).to_be_attached()
    assert session.errors == []


def test_a_head_s_page_is_in_the_link(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/sinks?layer=1&head=3").drawn(3)
    expect(session.page.get_by_text("Layer 1, head 3").first).to_be_visible()
    expect(session.page.get_by_text("Mean sink attention (%)").first).to_be_attached()
    expect(session.page.get_by_text("Layer 1, head 3 by position").first).to_be_attached()
    assert session.errors == []


@pytest.mark.parametrize(("label", "start"), [("SVG", b"<svg"), ("PNG", b"\x89PNG")])
def test_a_figure_is_downloaded(demo: str, browser: Browser, label: str, start: bytes) -> None:
    session = Session(browser, f"{demo}/experts?channel=final")
    heat(session.page, "demo-relative-final-all-all")  # it is drawn, or there is nothing to save
    with session.page.expect_download() as download:
        session.page.get_by_role("button", name=label, exact=True).first.click()
    assert Path(download.value.path()).read_bytes().startswith(start)
    assert download.value.suggested_filename == f"demo-relative-final-all-all.{label.lower()}"
    with session.page.expect_download() as download:
        session.page.get_by_role("link", name="Numbers as CSV").first.click()
    assert Path(download.value.path()).read_text().startswith("channel,")
    assert session.errors == []


def test_a_selection_is_kept_on_the_next_page_by_keyboard(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts").drawn()
    for name, choice in (("Channel", "final"), ("Task", "product"), ("Layer", "2")):
        session.page.get_by_label(name, exact=True).select_option(label=choice)
        session.page.wait_for_url(re.compile(f"{name.lower()}={choice}"))
    expect(session.page.get_by_text("Expert load relative to uniform: final, product").first).to_be_visible()
    session.page.get_by_role("link", name="Attention sinks").focus()
    session.page.keyboard.press("Enter")
    session.page.wait_for_url(re.compile("/sinks.*channel=final.*task=product"))
    session.drawn()
    expect(session.page.get_by_text("Sink attention: final, product").first).to_be_visible()
    expect(session.page.get_by_text("Layer 2, head 0").first).to_be_visible()
    assert session.errors == []


def test_panel_serve_shows_the_same_pages(demo_run: Path, browser: Browser) -> None:
    port = free_port()
    script = Path(__file__).parents[2] / "dashboards" / "app.py"
    command = [sys.executable, "-m", "panel", "serve", str(script), "--port", str(port), "--args", str(demo_run)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        session = Session(browser, f"http://localhost:{port}/app?page=experts").drawn()
        session.page.get_by_role("link", name="Effort").click()
        session.page.wait_for_url(re.compile("page=effort"))
        session.drawn()
        expect(session.page.get_by_text("Accuracy vs. reasoning length").first).to_be_visible()
        assert session.errors == []
    finally:
        server.terminate()
        server.wait(300)


def test_two_runs_are_compared_and_one_asks_for_another(
    demo: str, three_runs: tuple[str, Path], browser: Browser
) -> None:
    alone = Session(browser, f"{demo}/compare")
    expect(alone.page.get_by_text("Start the dashboard with two runs").first).to_be_visible()
    session = Session(browser, f"{three_runs[0]}/compare").drawn()
    expect(session.page.get_by_text("routers agree on 100.0 %").first).to_be_attached()
    assert session.errors == []


def test_a_run_that_is_written_shows_moving_progress(tmp_path: Path, browser: Browser) -> None:
    from tests.runs.conftest import LENGTHS, job, write_unit
    from workbench.capture.plan import plan_units
    from workbench.runs.writer import open_writer

    layout = plan_units(LENGTHS, 1024)
    with open_writer(tmp_path / "r.zarr", **job(layout)) as writer:
        write_unit(writer, 0)
        server, url = serve(str(tmp_path / "r.zarr"))
        try:
            session = Session(browser, f"{url}/overview")
            expect(session.page.get_by_text(f"1 of {len(layout.units)} units, ").first).to_be_visible()
            write_unit(writer, 1)
            expect(session.page.get_by_text(f"2 of {len(layout.units)} units, ").first).to_be_visible()
            shutil.rmtree(tmp_path / "r.zarr" / "tokens")
            session.page.wait_for_timeout(2500)
            expect(session.page.get_by_text("Overview").first).to_be_visible()
        finally:
            stop(server)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return the line by which `workbench dashboard …` refuses to serve; fail if it begins to."""

    def begins(*pages: object, **options: object) -> None:
        pytest.fail("the dashboard is served")

    monkeypatch.setattr(panel, "serve", begins)
    monkeypatch.setattr(dashboard, "_warm", lambda registry: None)  # which would go on after the test
    done = run_command("dashboard", *arguments)
    assert done.code == 2
    assert done.err.count("\n") == 1
    return done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["/no/such.zarr"], "does not exist"), ([os.devnull], "a file"), ([str(Path(__file__).parent)], "is not a run")],
)
def test_a_path_that_is_no_run_is_refused_before_serving(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in refused(monkeypatch, *arguments)


def test_a_port_in_use_is_refused_in_one_line(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = refused(monkeypatch, str(demo_run), "--port", port)
    assert f"port {port}" in message
    assert "--port" in message


def test_a_run_and_a_free_port_are_not_refused(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the refusals."""
    with pytest.raises(pytest.fail.Exception, match="the dashboard is served"):
        refused(monkeypatch, str(demo_run), "--port", str(free_port()))
