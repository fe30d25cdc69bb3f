"""A contrast's cells are drawn where they differ and pale where they do not; sizes by layer are those of the data."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures import contrast

CONTROLS = ["none", "position"]


@pytest.fixture
def ds() -> xr.Dataset:
    """Two layers of three experts; under the control of position one cell differs, +2 points."""
    difference = np.array([[[0.02, -0.01, 0.0], [0.0, 0.005, 0.0]]] * 2)
    different = np.zeros((2, 2, 3), dtype=bool)
    different[0, 0, :2] = different[1, 0, 0] = True
    cells = ("control", "layer", "expert")
    variables = {name: (cells, difference + 0.2) for name in ("mean_a", "mean_b")}
    variables |= {"low": (cells, difference - 0.004), "high": (cells, difference + 0.004)}
    variables |= {"difference": (cells, difference), "different": (cells, different)}
    variables |= {"q": (cells, np.where(different, 0.001, 0.6))}
    variables |= {
        "size": (cells[:2], np.array([[0.05, 0.013]] * 2)),
        "noise": (cells[:2], np.array([[0.03, 0.02]] * 2)),
    }
    variables |= {name: (cells[:1], np.array([30, 30])) for name in ("prompts", "tokens_a", "tokens_b")}
    coords = {"control": CONTROLS, "layer": [0, 1], "expert": [0, 1, 2]}
    attrs = {"title": "Final against analysis", "a": "final", "b": "analysis", "run_digest": "0123456789"}
    return xr.Dataset(variables, coords, attrs)


def coloured_cells(figure: object) -> list[set[tuple[int, int]]]:
    """The cells (layer, expert) with a value of each coloured heat map."""
    maps = [trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis]  # type: ignore[attr-defined]
    return [set(zip(*map(np.ndarray.tolist, np.nonzero(np.isfinite(np.array(m.z, float)))), strict=True)) for m in maps]


@pytest.mark.parametrize(("control", "expected"), [("none", {(0, 0), (0, 1)}), ("position", {(0, 0)})])
def test_the_heat_map_separates_cells_that_differ(ds: xr.Dataset, control: str, expected: set[tuple[int, int]]) -> None:
    strong, pale = coloured_cells(contrast.heatmap(ds, control))
    assert strong == expected
    assert pale == {(layer, expert) for layer in range(2) for expert in range(3)} - expected


def test_the_volcano_plot_names_the_cells_that_differ(ds: xr.Dataset) -> None:
    (points,) = contrast.volcano(ds).data
    assert list(points.text) == ["0.0", "", "", "", "", ""]
    np.testing.assert_allclose(points.x, 100 * ds["difference"].sel(control="position").values.ravel())


def test_sizes_are_those_beyond_noise(ds: xr.Dataset) -> None:
    dashed, solid = contrast.by_layer({"x": ds}, title="Sizes").data
    assert (dashed.line.dash, solid.line.dash) == ("dash", "solid")
    np.testing.assert_allclose(solid.y, [4.0, 0.0], atol=1e-9)  # √(5² − 3²), and noise alone in the second layer


def test_the_gallery_has_a_figure_for_each_control_that_has_prompts(ds: xr.Dataset) -> None:
    assert set(contrast.gallery({"x": ds}, title="Sizes")) == {"x_naive", "x_matched", "x_volcano", "sizes"}
    without = ds.assign(prompts=("control", np.array([30, 0])))
    assert set(contrast.gallery({"x": without}, title="Sizes")) == {"x_naive", "sizes"}
