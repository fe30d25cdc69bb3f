"""What *Copy as Python* copies draws the figure of the page again."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench import registry
from workbench.dashboards import python_code
from workbench.figures import quick_look as draw
from workbench.studies import effort, quick_look
from workbench.studies.comparison import EFFORTS

RUN = wb.open_run(DATA / "demo.zarr")
CELL = {"channel": "final", "effort": "high", "task": "all"}


def drawn(code: str) -> go.Figure:
    """Return the figure that the last line of the code evaluates to."""
    *lines, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return eval(last, names)


def selection(cell: Mapping[str, str]) -> go.Figure:
    return draw.heatmap(quick_look.routing(RUN, **cell), "load", marked=(1, 2), theme="dark")


def test_the_code_of_a_heat_map_has_its_selection_its_frame_its_theme_and_what_is_excluded() -> None:
    excluding = python_code.selection_heatmap(RUN, "routing", "load", CELL, "irregular", "dark", marked=(1, 2))
    code = excluding.replace(", exclude='irregular'", "")  # the bundled run stores no flags of its sequences
    assert code != excluding
    assert drawn(code) == selection(CELL)
    assert drawn(code) != selection({**CELL, "effort": "low"}), "negative control: another selection"


def test_the_code_of_a_study_has_its_runs_and_the_figure() -> None:
    record = registry.find("sink-difference")
    gallery = record.load_figures().gallery(wb.studies.run_study(record.name, RUN))
    first, *others = gallery
    code = python_code.study_figure(record, [RUN], first, "", "light")
    assert drawn(code) == gallery[first].draw()
    assert all(drawn(code) != gallery[other].draw() for other in others), "negative control: another figure"
    both = python_code.study_figure(registry.find("compare"), [RUN, RUN], "agreement", "", "light")
    assert "run_study('compare', run_a, run_b)" in both


def test_the_code_of_accuracy_has_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = effort.cost(RUN, effort.sequences_of(RUN), list(EFFORTS))

    def run_study(name: str, run: wb.Run) -> dict[str, xr.Dataset]:  # the whole study takes seconds
        assert (name, run.digest) == ("effort", RUN.digest)
        return {"cost": cost}

    monkeypatch.setattr(wb.studies, "run_study", run_study)
    figure, code = wb.figures.effort.accuracy_by_tokens, python_code.accuracy_figure(RUN, "sum", "", "light")
    assert drawn(code) == figure(cost, "sum")
    assert drawn(code) != figure(cost, "sort"), "negative control: another task"
