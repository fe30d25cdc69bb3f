"""A published run: pages that open from their folder, fetch nothing outside it, escape text and follow the theme."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import workbench as wb
from tests import browser
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench.dashboards.publish import chosen, described, site
from workbench.errors import InputError
from workbench.figures import report
from workbench.registry import find

DEMO = DATA / "demo.zarr"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.launched() as launched:
        yield launched


@pytest.fixture(scope="module", autouse=True)
def two_studies() -> Iterator[None]:
    """One study that this run allows and one that it does not: all of them are the report's subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "studies", lambda runs: [find("effort"), find("routing-agreement")])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "site"
    for name, content in site(wb.open_run(DEMO), conversations="0-1,product-01/high/0").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _addresses(page: Path) -> list[str]:
    text = re.sub(r"<script.*?</script>|srcdoc=\"[^\"]*\"", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"""(?:src|href)=["']([^"'#]+)""", text)


def test_every_address_is_a_file_of_the_folder(folder: Path) -> None:
    pages = list(folder.rglob("*.html"))
    assert len(pages) == 4 + 3
    for page in pages:
        for address in _addresses(page):
            assert (page.parent / address).resolve().is_relative_to(folder.resolve()), address
            assert (page.parent / address).is_file(), address


def test_neither_the_machine_nor_its_folders_are_named(folder: Path) -> None:
    host = wb.open_run(DEMO).provenance["host"]
    for page in folder.rglob("*.html"):
        text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
        assert str(DATA) not in text
        assert f"on {host}" not in text
    assert "this run recorded routing" in (folder / "index.html").read_text()


def test_the_conversations_are_those_that_were_chosen(folder: Path) -> None:
    run = wb.open_run(DEMO)
    numbers = chosen(run, "0-1,product-01/high/0")
    assert sorted(p.stem for p in folder.glob("conversations/*.html")) == sorted(map(str, numbers))
    assert chosen(run, "none") == []
    assert len(chosen(run, "all")) == len(run.sequences)
    assert chosen(run, "0, 0-1") == [0, 1]
    for wrong in ("600", "0,,1", "", "../x"):
        with pytest.raises(InputError):
            chosen(run, wrong)


def test_the_findings_link_to_their_sections_and_a_conversation_states_its_facts_in_words(folder: Path) -> None:
    findings = (folder / "findings.html").read_text()
    sections = re.findall(r'<h2 id="([^"]+)"', findings)
    assert sections == ["effort"]
    assert re.findall(r'<nav aria-label="sections">(.*?)</nav>', findings) == ['<a href="#effort">Effort</a>']
    run = wb.open_run(DEMO)
    number = chosen(run, "product-01/high/0")[0]
    row, text = run.sequences.loc[number], (folder / f"conversations/{number}.html").read_text()
    facts = f"task product · effort high · {row['length']} tokens · expected answer {row['answer']} · "
    assert facts + ("correct" if row["correct"] == 1 else "wrong") + "</p>" in text
    assert facts not in (folder / "conversations/0.html").read_text(), "negative control: another conversation"


def test_text_of_a_run_is_only_text() -> None:
    run = wb.open_run(DEMO)
    run.sequences["task"] = '"><img src=x onerror=alert(1)>'
    files = site(run, conversations="0", data=False)
    assert not any(b"<img src=x" in content for name, content in files.items() if name.endswith(".html"))


def test_sizes_are_stated_by_kind() -> None:
    files = {"index.html": b"a" * 1_000_000, "conversations/0.html": b"b" * 500_000, "data/x.csv": b"c"}
    assert list(described(files)) == [
        "pages: 1 file, 1.0 MB",
        "conversations: 1 file, 0.5 MB",
        "data: 1 file, 0.0 MB",
        "total: 3 files, 1.5 MB",
    ]


@pytest.mark.browser
def test_it_opens_from_the_folder_without_a_request_elsewhere(folder: Path, chromium: Browser) -> None:
    with browser.open_page(chromium, color_scheme="dark") as tab:
        requests: list[str] = []
        errors: list[str] = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto((folder / "index.html").as_uri())
        tab.get_by_role("link", name="Experts", exact=True).click()
        tab.wait_for_selector("[data-drawn=dark] .main-svg")
        tab.get_by_role("link", name="Conversations", exact=True).click()
        tab.get_by_role("link", name="product-01/high/0").click()
        text = tab.frame_locator("iframe").get_by_label("conversation", exact=True)
        text.get_by_text("assistant · final").wait_for()
        browser.expect_value(tab, lambda: tab.frames[1].evaluate("document.documentElement.className"), "dark")
        tab.get_by_role("link", name="← Previous conversation").click()
        tab.get_by_role("heading", name="product-00/").wait_for()
        tab.get_by_role("link", name="Experts", exact=True).click()  # from the folder of the conversations
        tab.set_viewport_size({"width": 700, "height": 900})
        tab.reload()
        tab.wait_for_selector("[data-drawn=dark] .main-svg")
        # nothing is cut off
        tab.wait_for_function("document.querySelector('[data-figure] .main-svg')?.clientWidth < 700")
        assert errors == []
        outside = [url for url in requests if not url.startswith((folder.as_uri(), "about:", "data:"))]
        assert outside == []


def test_the_command_states_the_size_and_writes_nothing_in_a_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "site"
    done = run_command("publish", str(DEMO), "--out", str(out), "--dry-run", "--conversations", "none")
    assert done.code == 0, done.err
    assert "total: " in done.out
    assert not out.exists()
    refused = run_command("publish", str(DEMO), "--out", str(DEMO))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
