"""Points have their own intervals, and an effect is filled by its test, or by its interval where there is no test."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.intervals import lines, rows, shown_effects


def effects(**more: object) -> xr.Dataset:
    values = {"change": [1.0, 0.2, -1.0], "change_low": [0.5, -0.1, -2.0], "change_high": [1.5, 0.5, -0.5]}
    ds = xr.Dataset({n: ("condition", v) for n, v in (values | more).items()}, {"condition": ["a", "b", "c"]})
    return ds.assign_attrs(title="t", method="m", summary="s")


def test_tested_effects_are_shown_by_q_and_others_by_their_interval() -> None:
    shown, rule = shown_effects(effects())
    assert shown.tolist() == [True, False, True]
    assert rule == "the interval excludes zero"
    shown, rule = shown_effects(effects(change_q=[0.2, 0.01, 0.05]))
    assert shown.tolist() == [False, True, True], "a test decides, even against the interval"
    assert rule == "q is at most 0.05"


def test_rows_have_bars_from_low_to_high() -> None:
    ds = effects()
    figure = rows(ds, "change", "condition", title="t", subtitle="", x_title="nats")
    (points,) = [trace for trace in figure.data if trace.type == "scatter"]
    np.testing.assert_allclose(points.error_x.array, ds["change_high"] - ds["change"])
    np.testing.assert_allclose(points.error_x.arrayminus, ds["change"] - ds["change_low"])
    filled = points.marker.color
    assert filled[0] == filled[2] != filled[1]
    assert figure.layout.shapes[0].x0 == 0, "a line at zero"


def test_a_line_without_values_is_left_out() -> None:
    ds = xr.Dataset(
        {"y": (("channel", "layer"), [[1.0, 2.0], [np.nan, np.nan]])},
        {"channel": ["analysis", "final"], "layer": [0, 1]},
    ).assign_attrs(title="t", method="m", summary="s")
    figure = lines(ds, "y", "layer", "channel", title="t", subtitle="", y_title="load")
    assert {trace.name for trace in figure.data} == {"analysis"}


def test_the_band_of_one_point_does_not_fill_the_figure() -> None:
    def drawn(layers: list[int]) -> go.Figure:
        values = {name: ("layer", np.full(len(layers), 0.5)) for name in ("y", "y_low", "y_high")}
        ds = xr.Dataset(values, {"layer": layers})
        return lines(ds, "y", "layer", None, title="t", subtitle="", y_title="load")

    assert drawn([2]).layout.xaxis.range == (1, 3)
    assert drawn([2, 3]).layout.xaxis.range is None, "negative control: several points need no range"
