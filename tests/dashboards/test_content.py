"""What pages say is what the run holds; no widget, no browser."""

import shutil
from pathlib import Path

import numpy as np
import panel as pn
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.dashboards import content
from workbench.dashboards.app import notebook
from workbench.dashboards.pages import made, page_titles
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.runs import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


@pytest.fixture(scope="module")
def registry() -> RunRegistry:
    return RunRegistry([DATA / "demo.zarr"])


def test_tokens_by_role_are_those_of_the_labels(run: Run) -> None:
    data = run.dataset[["role", "channel", "sequence"]].compute()
    effort = run.sequences["effort"].loc[data["sequence"].values].to_numpy()
    inside = data["channel"].values != CHANNELS.index("frame")
    table = content.tokens_by_role(run)
    for role, rows in table.groupby("role"):
        for e in ("low", "medium", "high"):
            here = inside & (data["role"].values == ROLES.index(str(role))) & (effort == e)
            assert rows[e].sum() == here.sum()
    final = inside & (data["channel"].values == CHANNELS.index("final"))
    assert table.query("role == 'assistant' and channel == 'final'")["all"].item() == final.sum()
    assert table["all"].sum() == inside.sum()


def test_whom_an_expert_works_with(registry: RunRegistry) -> None:
    pairs = registry.pairs("demo")
    assert pairs is not None
    partners = content.partners(pairs, "final", 2, 3)
    assert 3 not in set(partners["with expert"])
    assert (np.diff(partners["lift"]) <= 0).all()


@pytest.mark.parametrize("page", page_titles())
def test_what_is_damaged_is_said_on_every_page_and_the_rest_is_shown(page: str, tmp_path: Path) -> None:
    """Tables, sums and tokens are cut or gone; no page fails, and what could not be read is named."""
    damaged = shutil.copytree(DATA / "demo.zarr", tmp_path / "r.zarr")
    registry = RunRegistry([damaged], cache=tmp_path / "cache")
    whole = made(page, Session(registry, Selection({}), lambda: None))
    assert page == "compare" or not any(isinstance(part, pn.pane.Alert) for part in whole.main)
    for part in ("totals", "tokens", "routing", "sequences"):
        for file in sorted(p for p in (damaged / part).rglob("*") if p.is_file() and p.name != "zarr.json"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        registry._runs.clear()
        registry._made.clear()
        shown = made(page, Session(registry, Selection({}), lambda: None))
        assert shown.main
    said = " ".join(str(alert.object) for part in shown.main for alert in [part] if isinstance(alert, pn.pane.Alert))
    # results beside the run need its digest alone, and this run has no features that could be damaged
    assert "verify" in said or "two runs" in said or page in ("causal", "graph", "features")
    (damaged / "zarr.json").unlink()
    gone = made(page, Session(registry, Selection({}), lambda: None)) if page != "compare" else None
    assert gone is None or "is not" in str(gone.main[0].object)
    registry.desk.close()


def test_a_notebook_shows_every_page() -> None:
    for page in page_titles():
        assert len(notebook(DATA / "demo.zarr", page=page)) == 2
    with pytest.raises(InputError, match="no page is called"):
        notebook(DATA / "demo.zarr", page="none")
