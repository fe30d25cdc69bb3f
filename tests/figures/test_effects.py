"""Figures of experiments show every effect with its interval, and mark what the data do not show."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures.effects import ablation_heatmap, effect_bars

ABOUT = {
    "study": "effects",
    "rests_on": "6 sequences of 3 prompts",
    "checkpoint_digest": "c" * 64,
    "workbench_version": "0",
}


@pytest.fixture
def ablations() -> xr.Dataset:
    change = np.array([[-8.0, 0.1, np.nan], [2.0, -0.2, -3.0]])[..., None]
    values = {"change": change, "low": change - 0.5, "high": change + 0.5, "share": np.full_like(change, 1 / 3)}
    dims = ("layer", "expert", "group")
    coords = {"layer": [0, 1], "expert": [0, 1, 2], "group": ["sums"]}
    return xr.Dataset({k: (dims, v) for k, v in values.items()}, coords=coords, attrs=ABOUT)


def test_every_ablation_is_drawn_once_and_missing_ones_look_like_nothing_else(ablations: xr.Dataset) -> None:
    figure = ablation_heatmap(ablations, "sums")
    sure, unsure, missing = figure.data[:3]
    assert np.argwhere(~np.isnan(sure.z)).tolist() == [[0, 0], [1, 0], [1, 2]]
    assert np.argwhere(~np.isnan(unsure.z)).tolist() == [[0, 1], [1, 1]]
    assert np.argwhere(~np.isnan(missing.z)).tolist() == [[0, 2]]
    assert sure.z[0, 0] == -8
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-8, 8)
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert "pale, hatched: the interval includes zero" in names
    assert "checkpoint cccc" in figure.layout.annotations[0].text


def test_what_is_clipped_is_marked(ablations: xr.Dataset) -> None:
    figure = ablation_heatmap(ablations, "sums", clip=5.0)
    assert figure.data[0].z[0, 0] == -5
    assert any(trace.name == "clipped: below −5" for trace in figure.data)


def test_an_effect_whose_interval_includes_zero_is_open() -> None:
    effects = xr.Dataset(
        {
            "change": ("intervention", [-3.0, 0.1]),
            "low": ("intervention", [-4.0, -0.5]),
            "high": ("intervention", [-2.5, 1.0]),
        },
        coords={"intervention": ["forbid", "swap"]},
        attrs=ABOUT,
    )
    (points,) = effect_bars(effects, title="Effects").data
    filled, open_ = points.marker.color
    assert filled == points.marker.line.color
    assert open_ != filled
    assert list(points.y) == ["forbid", "swap"]
    np.testing.assert_allclose(points.error_x.array, [0.5, 0.9])
    np.testing.assert_allclose(points.error_x.arrayminus, [1.0, 0.6])
