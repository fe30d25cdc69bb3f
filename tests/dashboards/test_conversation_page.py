"""Conversations in a real browser: colours, search, replay, links, and text that stays text."""

import random
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

import workbench as wb
from tests.browser import expect_value, read_until
from tests.dashboards.browsing import Session, frame_of, serve, stop
from tests.dashboards.test_pages import violations

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, expect  # noqa: E402

pytestmark = pytest.mark.browser


def test_a_conversation_is_coloured_described_searched_and_replayed(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript?task=product&effort=high")
    frame = frame_of(session)
    tokens = frame.locator(".t")
    expect(tokens.nth(60)).to_be_attached()
    text = frame.locator("#text")
    expect(text).to_contain_text("assistant · analysis")
    expect(text).to_contain_text("Reasoning: high")
    tokens.nth(30).hover()
    for layer in range(4):
        expect(frame.locator("#details")).to_contain_text(f"layer {layer}")
    frame.select_option("#by", "expert")
    frame.select_option("#expert", "5")
    routed = frame.evaluate("spans.filter((s, i) => experts(0, i).includes(5)).length")
    assert routed > 0
    expect_value(session.page, lambda: frame.evaluate("spans.filter(s => s.style.background).length"), routed)
    frame.select_option("#by", "surprisal")
    expect(frame.locator("#scale")).to_have_text(re.compile(r"^\s*0\.00\s+≥ [1-9].*\(answer only\)\s*$"))
    frame.fill("#find", "reasoning: high")
    expect(frame.locator(".t.hit").nth(1)).to_be_attached()
    frame.fill("#find", "1")
    hits, number = frame.locator("#hits"), frame.evaluate("hits.length")
    assert number > 2
    expect(hits).to_have_text(f"1 of {number} hits")
    marked = "spans.flatMap((s, i) => s.classList.contains('at') ? [i] : [])"
    for keys, now in (("Enter", 2), ("Shift+Enter", 1), ("Shift+Enter", number)):
        frame.press("#find", keys)
        expect(hits).to_have_text(f"{now} of {number} hits")
        wanted = list(range(*frame.evaluate(f"hits[{now - 1}]")))
        expect_value(session.page, lambda: frame.evaluate(marked), wanted)
    expect(tokens.nth(30)).to_be_visible()
    frame.get_by_role("button", name="Fold all").click()
    expect(tokens.nth(30)).to_be_hidden()
    assert not any(frame.evaluate("spans.map(s => s.offsetHeight > 0)")), "negative control: one was visible before"
    frame.get_by_role("button", name="next hit").click()
    expect(frame.locator(".t.at").first).to_be_visible()  # its message is unfolded
    assert 0 < frame.evaluate("spans.filter(s => s.offsetHeight > 0).length") < tokens.count()
    frame.get_by_role("button", name="Fold all").click()
    frame.get_by_role("button", name="Unfold all").click()
    expect(tokens.nth(30)).to_be_visible()
    frame.select_option("#speed", "100")
    frame.click("#play")
    frame.wait_for_function("now > 0")
    replayed, routed = frame.evaluate("[now, counts[0].reduce((a, b) => a + b, 0)]")
    assert replayed > 0
    assert routed == 4 * replayed
    frame.wait_for_function("now >= n && timer === null")
    assert session.errors == []
    assert session.foreign == []


def link_of(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A random page with what can be chosen on it."""
    layer, expert = str(rng.randrange(4)), str(rng.randrange(16))
    effort = rng.choice(("low", "medium", "high"))
    if rng.random() < 0.3:
        return "experts", {
            "channel": rng.choice(("prompt", "final")),
            "effort": effort,
            "layer": layer,
            "expert": expert,
        }
    colour = rng.choice(("expert", "surprisal", "sink", "gates", "channel"))
    seen = {"sequence": str(rng.randrange(600)), "colour": colour, "layer": layer, "expert": expert, "effort": effort}
    return "transcript", seen | {"pin": str(rng.randrange(20)), "position": str(rng.randrange(1, 20))}


def test_random_links_reopen_what_they_name(demo: str, demo_run: Path, browser: Browser, long: bool) -> None:
    """Also where the filters of the link do not contain its conversation."""
    run, rng = wb.open_run(demo_run), random.Random(7)
    session = Session(browser, f"{demo}/overview")
    view, outside = "[$('by').value, $('layer').value, $('expert').value, String(pinned), String(now)]", 0
    for _ in range(30 if long else 8):
        page, asked = link_of(rng)
        session.page.goto(f"{demo}/{page}?{urlencode(asked)}")
        if page == "experts":
            title = f"Layer {asked['layer']}, expert {asked['expert']}"
            expect(session.page.get_by_role("heading", name=title)).to_be_visible()
            expect(session.page.get_by_label("Channel", exact=True)).to_have_value(asked["channel"])
        else:
            number = int(asked["sequence"])
            outside += run.sequences.loc[number, "effort"] != asked["effort"]
            expect(session.page.get_by_text(f"Id {run.sequences.loc[number, 'id']}").first).to_be_visible()
            wanted = [asked[name] for name in ("colour", "layer", "expert", "pin", "position")]
            expect_value(session.page, lambda: frame_of(session).evaluate(view), wanted)
        query = dict(parse_qsl(urlsplit(session.page.url).query))
        assert asked.items() <= query.items()
    assert outside, "otherwise the links prove nothing about filters"
    assert session.errors == []


def test_the_table_of_conversations_is_filtered_sorted_and_leads_to_one(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript?effort=high")
    page = session.page
    title = page.get_by_role("button", name="Table of conversations")
    expect(title).to_be_visible()
    expect(page.locator(".tabulator-row")).to_have_count(0)  # it is made when it is opened
    title.click()
    expect(page.get_by_text("The same in all: ")).to_contain_text("effort high")
    rows = page.locator(".tabulator-row")
    expect(rows).to_have_count(15)
    expect(rows.first).to_contain_text("/high/0")
    expect_value(page, lambda: violations(page.main_frame, []), [])
    page.locator(".tabulator-col", has_text="conversation").locator("input").press_sequentially("chain-0")
    expect(rows.first).to_contain_text("chain-0")
    page.locator(".tabulator-col-title", has_text="answer tokens").click()
    lengths = "a => a.map(r => Number(r.querySelector('[tabulator-field=\"answer tokens\"]').textContent))"
    # until the table is sorted; its rows differ, or the order would not show
    read_until(page, lambda: rows.evaluate_all(lengths), lambda shown: len(set(shown)) > 3 and shown == sorted(shown))
    link = rows.first.get_by_role("link")
    name = link.inner_text()
    link.click()
    expect(page.get_by_text(f"Id {name}").first).to_be_visible()
    assert (session.errors, session.foreign) == ([], [])


def test_next_opens_another_conversation_and_the_link_reopens_it(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript")

    def text(session: Session) -> str | None:
        return frame_of(session).locator("#text").text_content(timeout=5000)  # ms; its frame may be replaced meanwhile

    before = read_until(session.page, lambda: text(session), bool)
    session.page.get_by_text("next ›").click()
    session.page.wait_for_url(re.compile(r"sequence=\d+"))  # before the conversation is drawn
    shown = read_until(session.page, lambda: text(session), lambda shown: bool(shown) and shown != before)
    again = Session(browser, session.page.url)
    expect_value(again.page, lambda: text(again), shown)


# whether the selected entry of the list is in sight; with `up`, after the list was scrolled to its beginning
_IN_SIGHT = """up => { let inside = null; const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (e.matches('select[size]') && e.selectedOptions[0]) {
    if (up) e.scrollTop = 0;
    const list = e.getBoundingClientRect(), own = e.selectedOptions[0].getBoundingClientRect();
    inside = list.height > 0 && own.top >= list.top && own.bottom <= list.bottom; }
  if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return inside }"""


def test_the_list_scrolls_to_the_conversation_that_is_shown(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript?sequence=300")
    frame_of(session)
    session.page.wait_for_function(_IN_SIGHT, arg=False)
    assert session.page.evaluate(_IN_SIGHT, True) is False, "negative control: it begins with other conversations"
    session.page.get_by_text("next ›").click()
    session.page.wait_for_url(re.compile("sequence=301"))
    session.page.wait_for_function(_IN_SIGHT, arg=False)


def test_a_transcript_with_a_script_is_only_text(tmp_path: Path, browser: Browser) -> None:
    from tests.runs.conftest import LENGTHS, job, write_unit
    from workbench.capture.plan import plan_units
    from workbench.runs.writer import open_writer

    layout = plan_units(LENGTHS, 1024)
    wanted = job(layout)
    evil = "</script><script>parent.evil = window.evil = 1</script><img src=x onerror='evil=1'>"
    wanted["sequences"] = wanted["sequences"].assign(id=[f"{evil}{i}" for i in range(len(LENGTHS))], answer=evil)
    columns = {c: evil for c in ("author", "channel", "recipient", "content_type", "closed_by")}
    wanted["messages"] = wanted["messages"].assign(role=evil, content=0, stop=1, **columns)
    with open_writer(tmp_path / "evil.zarr", **wanted) as writer:
        for index in writer.pending():
            write_unit(writer, index)
        writer.finish()
    server, url = serve(str(tmp_path / "evil.zarr"))
    try:
        session = Session(browser, f"{url}/transcript")
        frame = frame_of(session)
        assert frame.evaluate("window.evil") is None
        assert session.page.evaluate("window.evil") is None
        assert session.foreign == []
    finally:
        stop(server)


def test_conversations_are_searched_by_their_text(demo: str, browser: Browser) -> None:
    session = Session(browser, f"{demo}/transcript?channel=final&effort=low&find=no+such+words")
    expect(
        session.page.get_by_text("No matching conversations. Change the filters or the search text.").first
    ).to_be_visible()
    box = session.page.get_by_label("Id, answer or text contains")
    box.fill("1")
    box.press("Enter")
    session.page.wait_for_url(re.compile("find=1&|find=1$"))
    frame = frame_of(session)
    expect(frame.locator("#text")).to_contain_text("Reasoning: low")
    expect(frame.get_by_label("search text")).to_have_value("1")
    expect(frame.locator("#hits")).to_contain_text("hit")
    expect(frame.locator(".t.at")).to_contain_text("1")
    session.page.goto(f"{demo}/transcript?find=chain-00&pin=3")  # an id, which is in no text, and a chosen token
    expect(frame_of(session).get_by_label("search text")).to_have_value("")
    assert session.errors == []
