"""The report: one page that needs nothing else, safe text, findings of every study, and nothing claimed without an interval."""

import re
from pathlib import Path

import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.figures.report import write_report
from workbench.registry import studies
from workbench.studies import run_study, save
from workbench.studies.result import load


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = wb.open_run(DATA / "demo.zarr")
    save(run_study("compare", run, run), folder / "results")
    write_report(run, folder / "report.html", results=load(folder / "results"))
    return folder / "report.html"


def test_it_tells_of_every_study_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    for study in studies(runs=1):
        made = f'id="{study.name}"' in text
        assert made or f"{study.title}: {study.name} needs a run that recorded" in text
    assert all(f'id="{name}"' in text for name in ("routing", "sinks", "channels", "effort", "compare"))
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", body)
    assert "https://" not in body
    assert text.count("Plotly.newPlot") >= 12
    for said in ("Method", "Not controlled", "not finished" if "writing" in body else "units"):
        assert said in body


def test_the_markdown_says_the_same(page: Path) -> None:
    text = page.with_suffix(".md").read_text()
    for name in ("routing", "sinks", "channels", "effort"):
        for dataset in run_study(name, wb.open_run(DATA / "demo.zarr")).values():
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
        for dataset in run_study(name, run).values():
            assert dataset.attrs["summary"].splitlines()[0] in text
    for title in ("Chain-of-thought ablation", "Expert ablation", "Attention knockout between channels"):
        assert f"## {title}" in text
