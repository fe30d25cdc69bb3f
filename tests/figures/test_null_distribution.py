"""Random effects are drawn in the row of the effect that they belong to, whatever the order of their axes."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures.null_distribution import drawable, null_figure

ATTRS = {"title": "T", "units": "nat"}


def test_groups_have_a_row_each_with_their_own_random_sets() -> None:
    change = (("group", "which"), np.array([[-2.0, 99.0], [0.1, 99.0]]))
    limits = {"low": (change[0], change[1] - 1), "high": (change[0], change[1] + 1)}
    random = (("group", "set"), np.array([[0.1, np.nan, -0.3], [0.0, 0.2, 0.4]]))
    ds = xr.Dataset({"change": change, **limits, "random": random}, {"group": ["a", "b"]}, ATTRS)
    assert drawable(ds)
    figure = null_figure(ds)
    assert [sorted(trace.x) for trace in figure.data[:2]] == [[-0.3, 0.1], [0.0, 0.2, 0.4]]
    assert list(figure.data[2].x) == [-2.0, 0.1], "the named set, not the mean of random ones"
    assert list(figure.data[2].error_x.array) == [1.0, 1.0]


def test_doses_of_steering_are_rows_and_its_controls_points() -> None:
    """There the axis of controls comes first, and the effect itself is the first of two directions."""
    dose = [-1.0, 0.5, 2.0]
    change = (("which", "dose"), np.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]))
    random = (("control", "dose"), np.arange(12.0).reshape(4, 3))
    ds = xr.Dataset({"change": change, "random": random}, {"which": ["own", "mean"], "dose": dose}, ATTRS)
    assert drawable(ds)
    figure = null_figure(ds)
    assert [list(trace.x) for trace in figure.data[:3]] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert list(figure.data[3].x) == [1.0, 2.0, 3.0]
    assert list(figure.layout.yaxis.ticktext) == ["-1.0", "0.5", "2.0"]
    assert len(figure.data) == 4, "negative control: rows by the first axis would be four, one for each control"


def test_measures_of_different_units_are_in_standard_deviations() -> None:
    random = np.array([[0.0, 1000.0], [2.0, 3000.0], [4.0, 5000.0]])
    variables = {"change": ("measure", np.array([6.0, 7000.0])), "random": (("set", "measure"), random)}
    ds = xr.Dataset(variables, {"measure": ["nats", "tokens"]}, ATTRS)
    figure = null_figure(ds)
    np.testing.assert_allclose(figure.data[2].x, [2.0, 2.0])
    assert "standard deviations" in figure.layout.xaxis.title.text
    assert figure.data[2].error_x.array is None, "this result has no interval"


@pytest.mark.parametrize("dims", [("control", "intervention", "measure"), ("intervention",), ("set", "other")])
def test_other_axes_are_not_drawn(dims: tuple[str, ...]) -> None:
    variables = {"change": (("intervention",), np.zeros(2)), "random": (dims, np.zeros((2,) * len(dims)))}
    assert not drawable(xr.Dataset(variables, attrs=ATTRS))
