"""Sink attention is drawn in percent at its layer and head, with missing heads marked, and by position."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures import sinks


@pytest.fixture
def mass() -> xr.Dataset:
    """Two layers of two heads in two channels; head 1 of layer 0 was not recorded, and commentary has no tokens."""
    values = np.array([[0.25, np.nan], [0.5, 0.125]])[None, None] * np.ones((2, 1, 1, 1))
    cells = ("channel", "effort", "layer", "head")
    variables = {name: (cells, values) for name in ("mass", "mass_low", "mass_high", "spread")}
    variables |= {name: (cells[:2], np.array([[40], [0]])) for name in ("tokens", "prompts")}
    coords = {"channel": ["final", "commentary"], "effort": ["low"], "layer": [0, 1], "head": [0, 1]}
    windows = {"window": ("layer", [128, 0])}
    return xr.Dataset(variables | windows, coords, {"title": "Sinks", "run_digest": "0123456789"})


def test_the_heat_map_has_percent_at_each_head_and_marks_what_is_missing(mass: xr.Dataset) -> None:
    figure = sinks.mass_heatmap(mass, "final", "low")
    (drawn,) = [trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis]
    np.testing.assert_allclose(np.array(drawn.z, float), [[25, np.nan], [50, 12.5]])
    assert figure.layout.coloraxis.cmax == 50
    assert "missing" in {trace.name for trace in figure.data}
    assert "layers with a window: 0" in figure.layout.title.subtitle.text


def test_the_gallery_has_the_cells_with_tokens_and_a_figure_for_each_layer(mass: xr.Dataset) -> None:
    bins = ("channel", "layer", "bin")
    values = np.linspace(0.1, 0.9, 8).reshape(2, 2, 2)
    variables = {name: (bins, values) for name in ("mass", "mass_low", "mass_high")}
    coords = {"channel": ["final", "commentary"], "layer": [0, 1], "bin": [0, 16]}
    position = xr.Dataset(variables | {"tokens": (bins[:1], [40, 0])}, coords, mass.attrs)
    items = sinks.gallery({"mass": mass, "position": position})
    assert set(items) == {"mass_final_low", "position_layer_0", "position_layer_1"}
    lines = [trace for trace in items["position_layer_1"].draw().data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["final"], "a channel without tokens has no line"
    np.testing.assert_allclose(lines[0].y, 100 * values[0, 1], err_msg="in percent")
