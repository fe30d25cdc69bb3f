"""A shared conversation is one file with its texts escaped, that fetches nothing."""

import re
from pathlib import Path

import panel as pn
import pytest

import workbench as wb
from tests.cli.test_cli import run as command
from tests.conftest import DATA
from workbench.dashboards.conversation import conversation_file
from workbench.dashboards.pages import made
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.runs import open_run

DEMO = str(DATA / "demo.zarr")


def test_a_conversation_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    first = str(open_run(DEMO).sequences["id"].iloc[0])
    assert command(capsys, "conversation", DEMO, first, "--out", str(out))[0] == 0
    page = out.read_text()
    assert "__DATA__" not in page
    assert "\\u003c|start|>" in page, "marks are escaped"
    assert not re.findall(r'(?:src|href)="https?://', page)
    code, _, err = command(capsys, "conversation", DEMO, "0", "--out", str(out))
    assert (code, err.count("\n")) == (2, 1)
    assert command(capsys, "conversation", DEMO, "0", "--out", str(out), "--overwrite")[0] == 0
    assert out.read_text() == page, "a number names the same conversation"
    assert command(capsys, "conversation", DEMO, "0-2", "--out", str(tmp_path / "three.html"))[0] == 0
    assert (tmp_path / "three.html").read_text().count("<iframe") == 3


@pytest.mark.parametrize("id", ["nobody", "100000", "5-100000", "3-1"])
def test_sequences_that_are_not_there_are_refused(id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "conversation", DEMO, id, "--out", str(tmp_path / "page.html"))
    assert code == 2
    assert "sequences, numbered from 0" in err


def test_the_dashboard_offers_the_same_file() -> None:
    run = wb.open_run(DEMO)
    number = int(run.sequences.index[2])
    page = conversation_file(run, number)
    assert page == conversation_file(run, run.sequences["id"][number])
    assert page != conversation_file(run, number + 1)
    assert page.startswith(b"<!doctype html>")
    assert conversation_file(run, "0-1").count(b"<details>") == 2
    with pytest.raises(InputError, match="600 sequences, numbered from 0"):
        conversation_file(run, "0-600")
    registry = RunRegistry([DEMO])
    shown = made("transcript", Session(registry, Selection({}), lambda: None))
    registry.jobs.close()
    (button,) = [w for w in shown.sidebar if isinstance(w, pn.widgets.FileDownload)]
    assert button.callback().getvalue() == conversation_file(run, int(shown.sidebar[1].value))
