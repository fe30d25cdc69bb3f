"""The pages in a real browser: the overview answers, results beside a run are shown, tables sort, text can be read."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

import workbench as wb
from tests.browser import expect_value, open_page, read_until
from tests.dashboards.browsing import UNNAMED, Session, frame_of, serve, stop
from tests.dashboards.test_attribution_graph import graph
from tests.dashboards.test_stored_results import effects
from workbench.dashboards.attribution_graph import graph_data
from workbench.dashboards.pages import page_titles
from workbench.studies.result import save

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Frame, expect  # noqa: E402

pytestmark = pytest.mark.browser

# texts whose colour on the nearest opaque ground has less contrast than WCAG's AA asks for; figures are not text here
PALE = """() => { const found = [];
  const rgb = text => (text.match(/[0-9.]+/g) || []).map(Number);
  const lum = c => { const v = c.slice(0, 3).map(x => x / 255)
      .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const up = e => e.parentElement || (e.getRootNode().host ?? null);
  const ground = e => { for (; e; e = up(e)) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const walk = root => { for (const e of root.querySelectorAll('*')) {
    if (e.shadowRoot) walk(e.shadowRoot);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || e.closest('svg, .js-plotly-plot, script, style, [disabled]')) continue;
    const s = getComputedStyle(e), a = lum(rgb(s.color)), b = lum(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && +s.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5) - .01) found.push(e.textContent.trim().slice(0, 30) + ' ' + ratio.toFixed(2)); } };
  walk(document); return found }"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, demo_run: Path) -> Iterator[str]:
    """A dashboard of a run that has an experiment and a graph beside it, and a file that is neither."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(demo_run, folder / "demo.zarr")
    digest = wb.open_run(demo_run).digest
    save({"sinks": effects(digest)}, folder / "results")
    (folder / "why.json").write_text(json.dumps(graph()))
    (folder / "broken.json").write_text("{")
    server, url = serve(str(folder / "demo.zarr"))
    yield url
    stop(server)


def test_an_experiment_beside_the_run_is_shown_with_its_interval(stored: str, browser: Browser) -> None:
    session = Session(browser, f"{stored}/causal").drawn()
    expect(session.page.get_by_role("heading", name="Sink ablation", level=2)).to_be_visible()
    expect(session.page.get_by_text("[-3.0, -1.0]").first).to_be_visible()
    expect(session.page.get_by_text("broken.json could not be read").first).to_be_visible()
    assert session.errors == session.foreign == []


def node(frame: Frame, id: str) -> int:
    number = frame.evaluate("id => N.findIndex(n => n.id === id)", id)
    assert number >= 0
    return int(number)


def graph_frame(session: Session) -> Frame:
    return frame_of(session, ".node")


def test_a_graph_is_explored_and_its_view_is_in_the_link(stored: str, browser: Browser) -> None:
    session = Session(browser, f"{stored}/graph")
    frame = graph_frame(session)
    expect(frame.locator(".node")).to_have_count(5)
    expert = node(frame, "0_9_1")
    frame.locator(f".node[data-i='{expert}']").click()
    side = frame.locator("#side")
    expect(side.get_by_role("heading", name="layer 0 expert 5")).to_be_visible()
    expect(side.get_by_text("layer 1 head 2 at 1")).to_be_visible()
    expect(side.get_by_text("−2.00")).to_be_visible()
    session.page.wait_for_url(re.compile("node=0_9_1"))
    link = session.page.get_by_role("link", name="effects of layer 0, expert 5")
    assert re.search(r"/experts\?.*expert=5", str(link.get_attribute("href")))
    assert "node=" not in str(link.get_attribute("href"))
    side.get_by_role("button", name="Pin", exact=True).click()
    session.page.wait_for_url(re.compile("pins=0_9_1"))
    assert "labels=" not in session.page.url, "negative control: no label is given yet"
    side.get_by_label("your label").fill("adds 'a' + 100 %")
    side.get_by_label("your label").press("Enter")
    expect(side.get_by_role("heading", name="adds 'a' + 100 %")).to_be_visible()
    session.page.wait_for_url(re.compile("labels=0_9_1"))
    before = frame.evaluate("view.k")
    frame.locator("#graph").focus()
    session.page.keyboard.press("+")
    frame.wait_for_function("before => view.k > before", arg=before)
    with session.page.expect_download() as download:
        frame.get_by_role("button", name="SVG").click()
    drawn = Path(download.value.path()).read_text()
    assert drawn.startswith("<svg")
    assert "var(--" not in drawn, "colours are written out: the file is on its own"
    again = graph_frame(Session(browser, session.page.url))
    expect(again.locator(".node.pin")).to_have_count(1)
    expect(again.locator(f".node.pin.now[data-i='{expert}']")).to_have_count(1)
    expect(again.locator("#side").get_by_role("heading", name="adds 'a' + 100 %")).to_be_visible()
    expect(again.locator("#shown")).to_have_text("5 of 5, 100 % of their influence")
    again.get_by_label("Pinned only").check()
    expect(again.locator(".node"), "the pinned one, and the target").to_have_count(2)
    expect(again.locator("#shown")).to_have_text("2 of 5, 50 % of their influence")
    again.page.wait_for_url(re.compile("subgraph=1"))
    again.get_by_label("Pinned only").uncheck()
    again.locator("#threshold").evaluate("e => { e.value = 20; e.oninput(); }")
    expect(again.locator(".node"), "the strongest one, and the pinned one").to_have_count(2)
    assert session.errors == session.foreign == []


def test_edges_that_carry_little_are_hidden_counted_and_left_out_of_the_file(stored: str, browser: Browser) -> None:
    session = Session(browser, f"{stored}/graph")
    frame = graph_frame(session)
    expect(frame.locator("#drawn")).to_have_text("4 of 4, 100 % of their influence")
    frame.locator("#edges").evaluate("e => { e.value = 80; e.oninput(); e.onchange(); }")
    # they carry 0.91, 0.5, 0.3 and 0.09 of 1.8: two of them are less than 80 %, three are more
    expect(frame.locator("#drawn")).to_have_text("3 of 4, 95 % of their influence")
    expect(frame.locator(".edge")).to_have_count(3)
    expect(frame.locator("#side h3").nth(1)).to_have_text(
        "Largest direct effects on the logit (2, 1 of them not drawn)"
    )
    session.page.wait_for_url(re.compile("edges=80"))
    with session.page.expect_download() as download:
        frame.get_by_role("button", name="JSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [link["weight"] for link in saved["links"]] == [-2, 1, 0.5]
    assert saved["metadata"]["info"]["shown_edges"] == "3 of 4, 95 % of their influence"
    again = graph_frame(Session(browser, session.page.url))
    expect(again.locator("#drawn")).to_have_text("3 of 4, 95 % of their influence")
    again.locator("#edges").evaluate("e => { e.value = 100; e.oninput(); }")
    expect(again.locator(".edge")).to_have_count(4)  # the negative control: nothing is hidden at 100 %
    assert session.errors == session.foreign == []


def test_pinned_nodes_become_a_supernode_that_is_named_saved_and_reopened(stored: str, browser: Browser) -> None:
    session = Session(browser, f"{stored}/graph?pins=0_9_1+1_2_1")
    frame = graph_frame(session)
    expect(frame.locator(".node.pin")).to_have_count(2)
    frame.get_by_label("name of the supernode").fill("carry <b>")
    frame.get_by_role("button", name="Group 2 pinned").click()
    expect(frame.get_by_role("heading", name="carry b")).to_be_visible()
    expect(frame.locator(".node"), "two nodes are one").to_have_count(4)
    lines = frame.locator("#side table").nth(1).locator("tr")
    expect(lines).to_have_count(1)
    expect(lines.first).to_contain_text("embedding of 'a'")
    expect(lines.first, "the edge of its member; the edge between the members is inside").to_contain_text("+0.50")
    session.page.wait_for_url(re.compile("groups="))
    with session.page.expect_download() as download:
        frame.get_by_role("button", name="JSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["qParams"]["supernodes"] == [["carry b", "0_9_1", "1_2_1"]]
    assert graph_data(saved)["supernodes"] == [["carry b", "0_9_1", "1_2_1"]], "the saved file is a graph itself"
    again = graph_frame(Session(browser, session.page.url))
    expect(again.locator(".node")).to_have_count(4)
    again.get_by_role("button", name="Expand").click()
    expect(again.locator(".node")).to_have_count(5)
    expect(again.locator(".hull")).to_have_count(1)
    again.get_by_role("button", name="Collapse").click()
    expect(again.locator(".node")).to_have_count(4)
    again.get_by_role("button", name="Ungroup").click()
    expect(again.locator(".node")).to_have_count(5)
    expect(again.locator(".node.pin")).to_have_count(0)
    assert session.errors == session.foreign == []


def test_a_label_of_an_expert_is_saved_beside_the_run(stored: str, browser: Browser) -> None:
    session = Session(browser, f"{stored}/experts?layer=1&expert=5").drawn()
    field = session.page.get_by_label("Label of this expert")
    expect(field).to_be_visible()  # the study of examples may have to be made first
    field.fill("digits <script>")
    session.page.get_by_role("button", name="Save label").click()
    expect(session.page.get_by_text("Saved in demo.zarr.labels.jsonl")).to_be_visible()
    session.page.reload()
    expect(session.page.get_by_label("Label of this expert")).to_have_value("digits <script>")
    assert session.errors == session.foreign == []


def test_the_overview_answers_with_links_to_what_it_names(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/overview?theme=dark")
    item = session.page.locator("li", has_text="of routed slots in").first
    expect(item).to_be_visible()  # the studies may have to be made first
    expect(session.page.locator(".wb-tile")).to_have_count(3)
    link = item.locator("a")
    query = dict(parse_qsl(urlsplit(link.get_attribute("href") or "").query))
    link.click()
    heading = f"Layer {query['layer']}, expert {query['expert']}"
    expect(session.page.get_by_role("heading", name=heading)).to_be_visible()
    session.page.wait_for_url(re.compile("theme=dark"))
    assert session.errors == []


def test_a_heading_sorts_a_table_and_a_row_opens_its_link(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/experts?channel=analysis&layer=1&expert=5").drawn()
    heading = session.page.locator("th", has_text="P(with | this)")
    table = session.page.locator("table", has=heading)
    heading.focus()
    session.page.keyboard.press("Enter")

    def column() -> list[float]:
        return [float(text) for text in table.locator("td:nth-child(3)").all_text_contents()]

    given = read_until(session.page, column, lambda given: len(set(given)) > 3 and given == sorted(given))
    heading.click()
    expect_value(session.page, column, given[::-1])
    partner = table.locator("tbody tr").first.locator("a").text_content()
    table.locator("tbody tr").first.locator("td").nth(2).click()
    expect(session.page.get_by_role("heading", name=f"Layer 1, expert {partner}")).to_be_visible()
    assert session.errors == []


def test_an_address_that_is_no_page_reports_it_and_links_to_pages(demo: str, browser: Browser) -> None:
    page = open_page(browser)
    answer = page.goto(f"{demo}/nosuch")
    assert answer is not None
    assert answer.status == 404
    expect(page.get_by_role("heading", name="There is no page at this address")).to_be_visible()
    page.get_by_role("link", name="Conversations").click()
    page.wait_for_url(re.compile("/transcript"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_have_landmarks_names_and_contrast(stored: str, browser: Browser, theme: str) -> None:
    session = Session(browser, f"{stored}/overview?theme={theme}").drawn()
    for page in ("overview", "causal", "graph"):
        session.page.goto(f"{stored}/{page}?theme={theme}")
        expect(session.page.locator(".bk-btn, iframe, pre").first).to_be_attached()
        session.page.wait_for_timeout(500)
        for landmark in ("banner", "navigation", "main"):
            expect(session.page.get_by_role(landmark), f"{page}: {landmark}").to_have_count(1)
        expect(session.page.locator("[aria-current=page]")).to_have_count(1)
        expect_value(session.page, lambda: session.page.evaluate(UNNAMED), [])
        expect_value(session.page, lambda: [text for f in session.page.frames for text in f.evaluate(PALE)], [])
    session.page.evaluate(
        """() => { document.body.append("faint");
                   document.body.style.color = getComputedStyle(document.body).backgroundColor; }"""
    )
    assert any("1.00" in text for text in session.page.evaluate(PALE)), "negative control: a text as its ground"
    assert session.errors == []


def test_a_narrow_window_has_a_menu_and_nothing_beyond_its_edge(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/overview", width=900).drawn()
    session.page.wait_for_function("document.documentElement.scrollWidth <= 900")
    navigation = session.page.get_by_role("link", name="Attention sinks")
    expect(navigation).to_be_hidden()
    session.page.get_by_role("button", name="Menu").click()
    expect(navigation).to_be_visible()
    navigation.click()
    session.page.wait_for_url(re.compile("/sinks"))
    session.page.set_viewport_size({"width": 420, "height": 800})
    for page in ("sinks", "transcript"):
        session.page.goto(f"{demo}/{page}")
        expect(session.page.locator("iframe, .js-plotly-plot").first).to_be_visible()
        session.page.wait_for_function("document.documentElement.scrollWidth <= 420")
    width = frame_of(session).locator("#text").evaluate("e => e.clientWidth")
    assert width > 250, "the text is beside nothing"


def test_the_small_map_of_a_conversation_colours_by_the_clicked_expert(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript?sequence=3")
    frame = frame_of(session)
    heat = frame.locator("#heat")
    expect(heat).to_be_visible()
    box = heat.bounding_box()
    assert box is not None
    heat.click(position={"x": box["width"] * 5.5 / 16, "y": box["height"] * 2.5 / 4})
    chosen = "[$('by').value, $('layer').value, $('expert').value]"
    expect_value(session.page, lambda: frame.evaluate(chosen), ["expert", "2", "5"])
    wanted = {"layer": "2", "expert": "5", "colour": "expert"}.items()
    session.page.wait_for_url(lambda url: dict(parse_qsl(urlsplit(url).query)).items() >= wanted)


# Tabulator draws its own table: a grid that contains a scrolled element and buttons, which ARIA does not allow
RUN_AXE = """async rules => (await axe.run(document, {iframes: false, resultTypes: ["violations"],
  ...(rules.length ? {runOnly: rules} : {})})).violations.filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => ({id: v.id, nodes: v.nodes.filter(n => v.id === "color-contrast" || !n.html.includes("tabulator"))}))
  .filter(v => v.nodes.length).map(v => v.id + ": " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 120)).join(" "))"""
# the default suite looks at these, and with --long at all pages
FEW = ("overview", "transcript", "causal")


def violations(frame: Frame, rules: list[str]) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python")
    frame.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    violated: list[str] = frame.evaluate(RUN_AXE, rules)
    return violated


def open_until_complete(session: Session, url: str, title: str) -> None:
    """Open a page and wait until nothing is loading any more."""
    session.page.goto(url)
    expect(session.page.get_by_role("heading", name=title, level=1)).to_be_visible()
    expect(session.page.get_by_text("The result will be cached")).to_have_count(0)
    session.page.wait_for_timeout(700)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_violation(demo: str, browser: Browser, theme: str, long: bool) -> None:
    session = Session(browser, f"{demo}/overview?theme={theme}")
    titles = page_titles()
    rules = [] if theme == "light" else ["color-contrast"]  # the rest does not depend on the theme
    for page in titles if long else FEW:
        open_until_complete(session, f"{demo}/{page}?theme={theme}&sequence=2", titles[page])
        # until there is none: the heading of a card may come after the card
        expect_value(session.page, lambda: [text for f in session.page.frames for text in violations(f, rules)], [])
    assert session.errors == session.foreign == []
    session.page.evaluate(
        """() => { const bad = document.createElement("p"); bad.textContent = "faint"; bad.style.color = "#888";
                   bad.style.background = "#999"; document.querySelector("main").prepend(bad); }"""
    )
    assert any(text.startswith("color-contrast") for text in violations(session.page.main_frame, rules)), (
        "negative control: a text without contrast"
    )
