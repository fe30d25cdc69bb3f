"""Cells of a heat map that are missing, zero, clipped or not shown cannot be taken for values."""

import numpy as np
import plotly.graph_objects as go

from workbench.figures.heatmap import CELL_HEIGHT, LayerHeatmap, points_between, scale_limit
from workbench.figures.template import THEMES

LAYERS, EXPERTS = np.arange(3), np.arange(4)
DETAIL = np.zeros((3, 4))


def heatmap() -> LayerHeatmap:
    return LayerHeatmap(LAYERS, EXPERTS, THEMES["light"])


def signs(figure: go.Figure, symbol: str) -> set[tuple[int, int]]:
    """Return the (layer, column) of a sign."""
    return {
        (int(y), int(x))
        for trace in figure.data
        if trace.type == "scatter" and trace.marker.symbol == symbol and trace.x[0] is not None
        for y, x in zip(trace.y, trace.x, strict=True)
    }


def test_loads_are_relative_to_uniform_with_unused_missing_and_clipped_cells_marked() -> None:
    load = np.full((3, 4), 0.25)
    load[0] = [1.0, 0.0, 0.0, 0.0]
    load[1] = np.nan
    figure = heatmap().loads(load, DETAIL, "", clip=2.0)
    colours = next(t for t in figure.data if t.type == "heatmap" and t.coloraxis)
    assert colours.z[2].tolist() == [1.0] * 4
    assert colours.z[0][0] == 2.0
    assert np.isnan(colours.z[0][1:]).all(), "an expert that was never selected has no colour of the scale"
    assert signs(figure, "triangle-up") == {(0, 0)}
    assert signs(figure, "x-thin") == {(1, column) for column in range(4)}
    assert {t.name for t in figure.data if t.name} >= {"never selected", "missing"}


def test_differences_that_are_not_shown_are_pale_and_hatched() -> None:
    values = np.array([[0.5, -3.0, 0.1, np.nan]] * 3)
    shown = np.array([[True, True, False, False]] * 3)
    drawn = heatmap()
    drawn.differences(values, shown, DETAIL, "", 1.0, "q is above 0.05")
    figure = drawn.finish_differences("expert", 1.0, {})
    assert signs(figure, "line-ne") == {(layer, 2) for layer in range(3)}
    assert signs(figure, "x-thin") == {(layer, 3) for layer in range(3)}
    assert signs(figure, "triangle-down") == {(layer, 1) for layer in range(3)}
    assert signs(figure, "triangle-up") == set()
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1.0, 1.0)


def test_clipped_cells_are_marked_whether_or_not_they_are_shown() -> None:
    values = np.array([[1.0, -3.0, 0.1, -0.4]] * 3)
    drawn = heatmap()
    drawn.differences(values, values > 0, DETAIL, "", 0.5, "q is above 0.05")
    figure = drawn.finish_differences("expert", 0.5, {})
    assert signs(figure, "triangle-up") == {(layer, 0) for layer in range(3)}
    assert signs(figure, "triangle-down") == {(layer, 1) for layer in range(3)}, "marked where it is not shown, too"
    legend = [trace.name for trace in figure.data if (trace.name or "").startswith("clipped")]
    assert legend == ["clipped: above +0.5", "clipped: below −0.5"], "each once in the legend"


def test_layer_zero_is_on_top_and_rows_keep_a_readable_height() -> None:
    figure = heatmap().finish("expert", {})
    bottom, top = figure.layout.yaxis.range
    assert bottom > top
    tall = LayerHeatmap(np.arange(200), EXPERTS, THEMES["light"])
    assert tall.height > 200 * CELL_HEIGHT[0]


def test_a_frame_surrounds_one_cell() -> None:
    drawn = heatmap()
    drawn.frame(2, 1)
    _, shape = drawn.figure.layout.shapes
    assert (shape.x0, shape.x1, shape.y0, shape.y1) == (0.5, 1.5, 1.5, 2.5)


def test_a_long_title_of_a_colour_bar_has_two_lines() -> None:
    assert points_between("analysis", "final") == "percentage points, analysis − final"
    long = points_between("final at low effort", "final at high effort")
    assert long == "points, final at low effort<br>− final at high effort"
    assert max(map(len, long.split("<br>"))) < 40 < len(long), "negative control: one line is longer than the bar"


def test_the_scale_reaches_what_is_shown_and_most_of_what_is_not() -> None:
    points = np.array([[1.0, -8.0, 0.5, np.nan]] * 10)
    nothing = np.zeros(points.shape, dtype=bool)
    assert scale_limit(points, nothing) == 8.0, "a third of the cells is that far from zero"
    assert scale_limit(points, points == 1.0) == 8.0
    single = np.zeros((10, 10))
    single[0, 0] = -8.0
    assert scale_limit(single, single < 0) == 8.0, "negative control: it is shown"
    assert scale_limit(single, single > 0) == 0.1, "one cell that is not shown has no say"
    assert scale_limit(points * np.nan, nothing) == 0.1
