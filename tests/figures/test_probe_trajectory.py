"""Intervals of a trajectory are seen to their ends, and a single layer is drawn in full colour."""

import numpy as np
import xarray as xr

from workbench.figures.probe_trajectory import trajectory


def drawn(low: float, layers: list[int]) -> xr.Dataset:
    cells = (len(layers), 2)
    values = {"auc": np.full(cells, 0.6), "auc_low": np.full(cells, low), "auc_high": np.full(cells, 0.9)}
    variables = {name: (("layer", "share"), value) for name, value in values.items()}
    coordinates = {"layer": layers, "share": [0.0, 1.0], "source": ["token"]}
    attrs = {"title": "t", "rests_on": "r"}
    return xr.Dataset(variables | {"baseline": (("source", "share"), np.full((1, 2), 0.5))}, coordinates, attrs)


def test_the_axis_begins_below_the_lowest_limit() -> None:
    assert trajectory(drawn(0.1, [2])).layout.yaxis.range[0] < 0.1
    assert trajectory(drawn(0.5, [2])).layout.yaxis.range[0] == 0.35, "negative control: the usual range"


def test_one_layer_is_not_pale() -> None:
    assert trajectory(drawn(0.5, [2])).data[0].opacity == 1
    assert trajectory(drawn(0.5, [2, 3])).data[0].opacity < 0.5, "negative control: the first of several is"
