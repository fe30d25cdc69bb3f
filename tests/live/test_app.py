"""The live page in a real browser: prompt, forbid experts, both answers, the recipe, and a viewer who leaves.

Tests `workbench.live.app`, `workbench.live.arrangement` and `workbench.live.expert_map`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect

from tests.browser import expect_value, launched, read_until
from tests.dashboards.browsing import UNNAMED, Session
from tests.dashboards.test_pages import violations
from tests.serving import free_port, wait_for
from workbench.research.recipe import Intervention, Recipe
from workbench.research.recipe_python import recipe_python

pytestmark = pytest.mark.browser
CELLS = tuple((1, expert) for expert in range(3, 12))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with what the server writes."""
    return tmp_path_factory.mktemp("server") / "log.txt"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the server's folder of recipes, with one that has four interventions and a file that is no recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    four = tuple(Intervention("scale_sinks", layers=(layer,), strength=0.5) for layer in range(4))
    (folder / "four layers.json").write_text(Recipe(user="12+7", effort="low", interventions=four).to_json())
    (folder / "<b>.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def url(log: Path, recipes: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "workbench.cli", "live", "nano", "--dtype", "float32", "--port", str(port)]
    command += ["--recipes", str(recipes)]
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
    wait_for(port, server)
    yield f"http://localhost:{port}/live"
    server.send_signal(signal.SIGINT)
    assert server.wait(300) in (0, 130)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser of the module; the pages of a test are closed at its end."""
    yield chromium
    for context in chromium.contexts:
        context.close()


def run_to_the_end(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    expect(
        page.get_by_text("Generating the").or_(page.get_by_text("Waiting:")).or_(page.get_by_text("Done."))
    ).to_be_visible()
    expect(page.get_by_text("Done.")).to_be_visible()


def recipe_of(page: Page) -> Recipe:
    return Recipe.from_json(parse_qs(urlsplit(page.url).query)["recipe"][0])


# presses Run and returns the seconds until the first text of an answer is on the page
FIRST_TOKEN = """async () => {
  const find = (root, test) => { for (const e of root.querySelectorAll('*')) { if (test(e)) return e;
    const inner = e.shadowRoot && find(e.shadowRoot, test); if (inner) return inner; } return null; };
  const text = () => find(document, e => e.classList.contains('lv-text') && e.textContent.trim());
  const run = find(document, e => e.tagName === 'BUTTON' && e.textContent.trim() === 'Run');
  if (text()) return -1;
  const start = performance.now(); run.click();
  while (!text()) await new Promise(next => setTimeout(next, 5));
  return (performance.now() - start) / 1000; }"""


@pytest.mark.long
def test_seconds_until_the_first_token(url: str, browser: Browser) -> None:
    """Print them for new pages; the docs have the numbers of `pytest -s --long tests/live/test_app.py -k seconds`."""
    seconds = []
    for number in range(6):
        page = Session(browser, url).page
        page.get_by_label("User message").fill(f"{number + 11}*7")
        page.wait_for_timeout(1500)
        seconds.append(float(page.evaluate(FIRST_TOKEN)))
        expect(page.get_by_text("Done.")).to_be_visible()
        assert page.evaluate(FIRST_TOKEN) == -1, "negative control: there is a text already"
        page.close()
    print(f"first token on the live page (s): {', '.join(f'{value:.2f}' for value in seconds)}")
    assert min(seconds) > 0


@pytest.mark.slow
def test_prompt_forbid_compare_and_copy(url: str, browser: Browser, tmp_path: Path) -> None:
    session = Session(browser, f"{url}?theme=dark")
    page = session.page
    page.context.grant_permissions(["clipboard-write"])  # a click is enough in a window, not in a headless shell
    page.get_by_label("User message").fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_text("cannot express the character '<'")).to_be_visible()  # nano's vocabulary is small
    page.get_by_label("User message").fill("12+7")
    page.get_by_role("button", name="low", exact=True).click()
    run_to_the_end(page)
    expect(page.get_by_text("No interventions.")).to_be_visible()
    for layer, expert in CELLS:
        page.get_by_role("button", name=f"layer {layer}, expert {expert}:").click()
    page.get_by_role("button", name="Forbid experts").click()
    expect(page.get_by_label("Experts (layer:expert)")).to_have_value("1:3 1:4 1:5 1:6 1:7 1:8 1:9 1:10 1:11")
    run_to_the_end(page)
    expect(page.get_by_text("The interventions change the log-probability")).to_be_visible()
    expect(page.get_by_text("assistant · final")).to_have_count(2)
    expect(page.get_by_text("layer 3", exact=True)).to_be_visible()
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.get_by_text("import workbench as wb")).to_be_visible()
    recipe = read_until(page, lambda: recipe_of(page), lambda recipe: bool(recipe.interventions))
    assert recipe.interventions == (Intervention("forbid", cells=CELLS),)
    assert (recipe.user, recipe.effort) == ("12+7", "low")
    expect_value(page, lambda: page.locator("pre").inner_text().strip(), recipe_python(recipe).strip())
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save the recipe").or_(page.get_by_role("button", name="Save the recipe")).click()
    saved.value.save_as(tmp_path / "recipe.json")
    assert Recipe.from_file(tmp_path / "recipe.json") == recipe
    expect_value(page, lambda: page.evaluate(UNNAMED), [])
    expect_value(page, lambda: violations(page.main_frame, []), [])
    assert (session.errors, session.foreign) == ([], [])
    again = Session(browser, page.url)  # the address repeats the experiment
    expect(again.page.get_by_label("Experts (layer:expert)")).to_have_value("1:3 1:4 1:5 1:6 1:7 1:8 1:9 1:10 1:11")
    broken = Session(browser, f"{url}?{urlencode({'recipe': json.dumps({'recipe': 1, 'users': '<b>x'})})}")
    expect(broken.page.get_by_text("'users' is unknown")).to_be_visible()


@pytest.mark.slow
def test_what_a_button_did_is_shown_beside_it(url: str, browser: Browser) -> None:
    """Continue shows what came before, Edit opens the field, and a refusal of the recipe is below its buttons."""
    session = Session(browser, url)
    page = session.page
    page.get_by_label("New tokens").fill("12")
    page.get_by_label("New tokens").press("Tab")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_text("cut off after 12 new tokens")).to_be_visible()
    before = page.locator(".lv-text").first.inner_text()
    expect(page.locator(".lv-given")).to_have_count(0)
    page.get_by_role("button", name="Continue", exact=True).click()
    expect(page.locator(".lv-given").first).to_be_visible()
    expect(page.get_by_text("cut off after 12 new tokens")).to_be_visible()
    answer = page.locator(".lv-text").first
    expect(answer).not_to_have_text(before)
    expect(page.get_by_text("cut off after 12 new tokens")).to_be_visible()
    after = answer.inner_text()
    assert after.startswith(before)
    field = page.get_by_label("Beginning of the answer")
    expect(field).to_be_hidden()
    page.get_by_role("button", name="Edit the answer").click()
    expect(field).to_be_visible()
    expect(field).to_have_value(f"<|channel|>analysis<|message|>{after}")
    study = page.get_by_role("button", name="Copy as a study")
    study.click()
    refused = page.get_by_text("there is no intervention to test")
    expect(refused).to_be_visible()

    def distance() -> float:
        button, text = (one.evaluate("e => e.getBoundingClientRect().top") for one in (study, refused))
        return float(text - button)

    read_until(page, distance, lambda pixels: 0 < pixels < 200)
    assert (session.errors, session.foreign) == ([], [])


@pytest.mark.slow
def test_wrong_inputs_stay_in_their_fields_and_leave_no_traceback(url: str, browser: Browser, log: Path) -> None:
    session = Session(browser, url)
    page = session.page
    page.get_by_role("button", name="Forbid experts").click()
    expect(page.get_by_text("no experts are selected")).to_be_visible()
    page.get_by_role("button", name="Scale sinks").click()
    strength = page.get_by_label("Strength")
    for text in ("abc", "", "nan", "1e400"):
        strength.fill(text)
        page.get_by_role("button", name="Run", exact=True).click()
        shown = f"Strength '{text}': expected a number" if text else "Strength is empty: expected a number"
        expect(page.get_by_text(shown)).to_have_count(2)  # on the card and below Run
        expect(strength).to_have_value(text)
    page.get_by_label("Temperature").fill("99")
    strength.fill("0.5")
    page.get_by_role("button", name="Save the recipe").click()
    expect(page.get_by_text("Temperature '99': expected a number from 0 to 10")).to_be_visible()
    page.get_by_label("Temperature").fill("0")
    with page.expect_download():
        page.get_by_role("button", name="Save the recipe").click()
    run_to_the_end(page)  # negative control: right inputs are accepted
    assert (session.errors, session.foreign) == ([], [])
    written = log.read_text()
    assert "Traceback" not in written, written
    assert url.rpartition("/")[0] in written, "negative control: it is the server's log"


@pytest.mark.slow
def test_a_saved_recipe_is_loaded_by_a_click_and_its_answers_are_on_the_first_screen(
    url: str, recipes: Path, browser: Browser
) -> None:
    session = Session(browser, url)
    page = session.page
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(page.get_by_text("Skipped <b>.json:")).to_be_visible()
    page.get_by_role("button", name="four layers").click()
    expect(page.get_by_text("The recipe “four layers” was loaded. Press Run.")).to_be_visible()
    folded = [
        page.get_by_role("button", name=f"Sinks of layer {n} × 0.5; acts on all tokens", exact=True) for n in (0, 3)
    ]
    run_to_the_end(page)
    answers = page.get_by_text("assistant · final")
    expect(answers).to_have_count(2)
    for number in range(2):
        expect(answers.nth(number)).to_be_in_viewport()
    folded[0].click()
    expect(folded[1]).to_be_visible()  # one card is open at a time
    page.get_by_label("Strength").locator("visible=true").first.scroll_into_view_if_needed()
    expect(answers.first).to_be_in_viewport()  # it stays in sight beside the cards
    page.get_by_label("Name of the recipe").fill("my layers")
    page.get_by_role("button", name="Save for all viewers").click()
    expect(page.get_by_text("was saved for all viewers as my layers.json")).to_be_visible()
    expect(page.get_by_role("button", name="my layers")).to_be_visible()
    assert Recipe.from_file(recipes / "my layers.json") == Recipe.from_file(recipes / "four layers.json")
    expect_value(page, lambda: violations(page.main_frame, []), [])
    page.set_viewport_size({"width": 700, "height": 800})
    page.evaluate("window.scrollTo(0, 0)")
    expect(answers.first).not_to_be_in_viewport()  # negative control: one column
    expect_value(page, lambda: page.evaluate("document.documentElement.scrollWidth"), 700)
    assert (session.errors, session.foreign) == ([], [])
