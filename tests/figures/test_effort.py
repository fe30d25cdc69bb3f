"""Accuracy is drawn at the analysis tokens that it took, with both intervals."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures import effort


@pytest.fixture
def cost() -> xr.Dataset:
    accuracy, tokens = np.array([[0.4, 0.8], [0.2, 0.6]]), np.array([[10.0, 50.0], [5.0, 20.0]])
    dims = ("task", "effort")
    variables = {"accuracy": (dims, accuracy), "analysis_tokens": (dims, tokens)}
    variables |= {f"accuracy_{k}": (dims, accuracy + d) for k, d in (("low", -0.1), ("high", 0.05))}
    variables |= {f"analysis_tokens_{k}": (dims, tokens + d) for k, d in (("low", -2), ("high", 4))}
    attrs = {"title": "Effort", "run_digest": "0123456789"}
    return xr.Dataset(variables, {"task": ["all", "sum"], "effort": ["low", "high"]}, attrs)


def test_points_are_the_means_and_bars_their_intervals(cost: xr.Dataset) -> None:
    grey, low, high = effort.accuracy_by_tokens(cost).data
    assert (grey.mode, list(grey.y)) == ("lines+text", [20, 60])
    assert grey.text[-1] == grey.name
    flat = effort.accuracy_by_tokens(cost.assign(accuracy=cost["accuracy"] * 0 + 0.5)).data[0]
    assert flat.mode == "lines", "negative control: a task that does not change has no name in the figure"
    assert (low.name, low.x[0], low.y[0]) == ("low", 10, 40)
    assert (high.name, high.x[0], high.y[0]) == ("high", 50, 80)
    for point in (low, high):
        assert point.error_y.array[0] == pytest.approx(5)
        assert point.error_y.arrayminus[0] == pytest.approx(10)
        assert (point.error_x.array[0], point.error_x.arrayminus[0]) == (4, 2)


def test_one_task_is_drawn_alone(cost: xr.Dataset) -> None:
    figure = effort.accuracy_by_tokens(cost, "sum")
    assert [(trace.name, trace.x[0]) for trace in figure.data] == [("low", 5), ("high", 20)]
    assert figure.layout.title.text.endswith("sum")


def test_the_gallery_has_differences_only_where_a_run_has_them(cost: xr.Dataset) -> None:
    assert set(effort.gallery({"cost": cost})) == {"accuracy_by_tokens"}
