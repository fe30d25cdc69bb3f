"""The script of `make findings`: its sections are of registered studies with options that they have; it resumes."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import findings
from workbench import registry


@pytest.mark.parametrize("name", list(findings.SECTIONS))
def test_a_section_is_of_a_registered_study_and_its_options_are_known(name: str) -> None:
    section = findings.SECTIONS[name]
    record = registry.find(section.study or name)
    assert record.name == (section.study or name)
    assert set(section.options) <= set(record.options)
    assert isinstance(record, registry.Experiment) == (section.sequences > 0)


def test_every_figure_of_the_gallery_is_one_of_a_study_of_the_findings() -> None:
    page = (findings.ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"pictures/gallery-([a-z-]+)\.svg", page)) == set(findings.PICTURES)
    for name in findings.PICTURES:
        assert name in findings.STUDIES or name in findings.SECTIONS
    for name, (_, options) in findings.STUDIES.items():
        assert set(options) <= set(registry.find(name).options)


def test_results_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run_experiment(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        made.append(name)
        return {}

    monkeypatch.setattr(findings.wb, "open_run", lambda _: SimpleNamespace(digest="digest"))
    monkeypatch.setattr(findings.wb, "load", lambda *_, **__: None)
    monkeypatch.setattr(findings, "run_experiment", run_experiment)
    monkeypatch.setattr(findings, "save", lambda *_, **__: [])
    for _ in range(2):
        findings.make(tmp_path, ["steering", "patching"])
    assert made == ["steering", "patching"]
    monkeypatch.setitem(findings.SECTIONS, "steering", findings.Section(6))  # negative control: another sample
    findings.make(tmp_path, ["steering", "patching"])
    assert made == ["steering", "patching", "steering"]
