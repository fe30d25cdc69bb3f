"""Figures of experiments show every effect with its interval, and mark what the data do not show."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures.effects import ablation_heatmap, effect_bars
from workbench.figures.experiments import figure

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
    drawn = ablation_heatmap(ablations, "sums")
    sure, unsure, missing = drawn.data[:3]
    assert np.argwhere(~np.isnan(sure.z)).tolist() == [[0, 0], [1, 0], [1, 2]]
    assert np.argwhere(~np.isnan(unsure.z)).tolist() == [[0, 1], [1, 1]]
    assert np.argwhere(~np.isnan(missing.z)).tolist() == [[0, 2]]
    assert sure.z[0, 0] == -8
    assert (drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax) == (-8, 8)
    names = [trace.name for trace in drawn.data if trace.showlegend is not False]
    assert "pale, hatched: not shown to differ from 0 (shown where the interval excludes zero)" in names
    assert "checkpoint cccc" in drawn.layout.annotations[0].text


def test_what_is_clipped_is_marked(ablations: xr.Dataset) -> None:
    drawn = ablation_heatmap(ablations, "sums", clip=5.0)
    assert drawn.data[0].z[0, 0] == -5
    assert any(trace.name == "clipped: below −5" for trace in drawn.data)


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


def test_figures_mark_what_the_summaries_call_an_effect(ablations: xr.Dataset) -> None:
    """By q where effects were tested together. Negative control: the interval of the second one excludes zero too."""
    effects = xr.Dataset(
        {
            "change": ("intervention", [-3.0, -0.3, 0.1]),
            "low": ("intervention", [-4.0, -0.5, -1.0]),
            "high": ("intervention", [-2.5, -0.1, 1.0]),
            "q": ("intervention", [0.01, 0.06, 0.8]),
        },
        coords={"intervention": ["forbid", "swap", "halve"]},
        attrs=ABOUT | {"title": "Effects"},
    )
    for drawn in (effect_bars(effects, title="Effects"), figure(effects)):
        (points,) = drawn.data
        assert [colour == points.marker.line.color for colour in points.marker.color] == [True, False, False]
        assert "filled where q is at most 0.05" in drawn.layout.title.subtitle.text
    (points,) = effect_bars(effects.drop_vars("q"), title="Effects").data
    assert points.marker.color[1] == points.marker.line.color, "negative control"
    ablations["q"] = ablations["change"] * 0 + np.array([[0.01, 0.9, np.nan], [0.2, 0.9, 0.04]])[..., None]
    assert np.argwhere(~np.isnan(ablation_heatmap(ablations, "sums").data[0].z)).tolist() == [[0, 0], [1, 2]]


def test_named_experts_are_marked_by_their_rank_among_random_sets() -> None:
    """Negative control: by their intervals over prompts, all rows would be filled."""
    change = np.full((2, 4), -2.0)
    sets = xr.Dataset(
        {
            **{name: (("group", "which"), change + d) for name, d in (("change", 0), ("low", -1), ("high", 1))},
            "q": ("group", [0.02, 0.3]),
        },
        coords={"group": ["sums", "facts"], "which": ["named", "random", "difference", "others"]},
        attrs=ABOUT | {"title": "Named experts"},
    )
    (points,) = figure(sets).data
    filled = [
        label for label, colour in zip(points.y, points.marker.color, strict=True) if colour == points.marker.line.color
    ]
    assert filled == ["sums: named"]
    assert (sets["low"] * sets["high"] > 0).all()
