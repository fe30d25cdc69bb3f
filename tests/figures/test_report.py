"""The report: one page that needs nothing else, safe text, findings of every study, no claim without an interval."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import workbench as wb
from tests import browser
from tests.conftest import DATA
from tests.figures.conftest import shared_studies, study_of_demo
from workbench.errors import InputError
from workbench.figures.report import answers, gather, write_report
from workbench.figures.template import ThemeName
from workbench.registry import studies
from workbench.studies import run_study, save
from workbench.studies.result import load


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = wb.open_run(DATA / "demo.zarr")
    save(run_study("compare", run, run), folder / "results")
    with shared_studies():
        write_report(run, folder / "report.html", results=load(folder / "results"))
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.launched() as launched:
        yield launched


def test_it_describes_every_study_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    for study in studies(runs=1):
        made = f'id="{study.name}"' in text
        assert made or f"{study.title}: {study.name} needs a run that recorded" in text
    assert all(f'id="{name}"' in text for name in ("routing", "sinks", "channels", "effort", "compare"))
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", body)
    assert "https://" not in body
    assert text.count("data-figure style") >= 12
    for expected in ("Methods", "Not controlled", "Provenance"):
        assert expected in body


def test_it_opens_with_the_answers(page: Path) -> None:
    text = page.read_text()
    first, rest = text.index("<h2>Answers</h2>"), text.index('<h2 id="')
    answers = text[first:rest]
    assert '<td>low</td><td class="number">70.5 [63.8, 76.4]</td>' in answers
    assert "Accuracy rises from low to high effort" in answers
    assert answers.count("<li>") == 5
    assert "are expected to be false" in answers
    assert "Not tested (" in answers
    assert rest < text.index("<h2>Provenance</h2>")


def test_null_results_open_with_no_difference(tmp_path: Path) -> None:
    run = wb.open_run(DATA / "demo.zarr")
    with shared_studies():
        contents = gather(run)
    assert "No difference is shown" not in "".join(answers(contents)), "the demo run has differences"
    none = {
        study: {
            name: dataset.assign(different=dataset["different"] & False) if "different" in dataset else dataset
            for name, dataset in sets.items()
        }
        for study, sets in contents.results.items()
    }
    opening = "".join(answers(contents._replace(results=none)))
    assert "No difference is shown within prompts and at equal position." in opening


WIDEST = """() => Math.max(...[...document.querySelectorAll("[data-figure] .main-svg")].map(
    e => e.getBoundingClientRect().width))"""


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_short_and_draws_in_the_readers_theme(page: Path, theme: ThemeName, chromium: Browser) -> None:
    with browser.open_page(chromium, viewport={"width": 1280, "height": 900}, color_scheme=theme) as tab:
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page.as_uri())
        first = tab.locator("[data-figure]").first
        first.scroll_into_view_if_needed()
        expect(first.locator(".main-svg").first).to_be_attached()
        expect(first).to_have_attribute("data-drawn", theme)
        sections = tab.locator("h2[id]").count()
        # answers and provenance are less than two screens, and a study about one
        assert tab.evaluate("document.documentElement.scrollHeight") < 900 * (2 + sections)
        # negative control: on the screen it is wider than paper
        browser.read_until(tab, lambda: tab.evaluate(WIDEST), lambda width: width > 800)
        tab.emulate_media(media="print")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        # it fits between the margins of A4 and letter paper
        browser.read_until(tab, lambda: tab.evaluate(WIDEST), lambda width: 600 < width < 700)
        expect(tab.locator("details:not([open])")).to_have_count(0)
        assert errors == []


def test_the_markdown_has_the_same_content(page: Path) -> None:
    text = page.with_suffix(".md").read_text()
    for name in ("routing", "sinks", "channels", "effort"):
        for dataset in study_of_demo(name).values():
            assert dataset.attrs["summary"] in text


def test_text_of_a_run_is_only_text(tmp_path: Path) -> None:
    run = wb.open_run(DATA / "demo.zarr")
    run.sequences["task"] = "<script>alert(1)</script>"
    run.provenance = {**run.provenance, "host": "<script>alert(2)</script>"}
    write_report(run, tmp_path / "r.html")
    assert "<script>alert" not in (tmp_path / "r.html").read_text()


def test_a_report_is_a_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html"):
        write_report(wb.open_run(DATA / "demo.zarr"), tmp_path / "report.pdf")


def test_the_findings_that_come_along_are_those_of_the_finished_run() -> None:
    run = wb.open_run(DATA / "demo.zarr")
    text = (DATA / "findings.md").read_text()
    assert run.digest in text
    for name in ("sinks", "channels", "effort"):  # no random numbers in these
        for dataset in study_of_demo(name).values():
            assert dataset.attrs["summary"].splitlines()[0] in text
    for title in ("Chain-of-thought ablation", "Expert ablation", "Attention knockout between channels"):
        assert f"## {title}" in text
