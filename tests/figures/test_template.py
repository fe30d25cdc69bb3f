"""Colours that can be read and distinguished, in both themes and by colour-blind readers; bands with their gaps."""

from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr

from workbench.figures.template import LIGHT, MARKERS, THEMES, apply_theme, band, translucent
from workbench.harmony.labels import CHANNELS

# full deficiency, linear RGB: Machado, Oliveira & Fernandes 2009
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def linear(colour):
    value = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def lab(colour, deficiency):
    rgb = np.clip(np.asarray(DEFICIENCIES[deficiency]) @ linear(colour), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ rgb / [0.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_has_contrast(theme):
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_lines_and_markers_have_contrast(theme):
    for colour in (*theme.channel.values(), *theme.effort.values()):
        assert contrast(colour, theme.paper) > 3


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_channels_and_efforts_stay_apart(theme, deficiency):
    for colours in (theme.channel, theme.effort):
        for one, other in combinations(colours, 2):
            distance = np.linalg.norm(lab(colours[one], deficiency) - lab(colours[other], deficiency))
            assert distance > 14, f"{one} and {other}: {distance:.1f}"


def test_red_and_green_of_one_lightness_would_be_noticed():
    assert np.linalg.norm(lab("#b03030", "deutan") - lab("#6a6a2f", "deutan")) < 14


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_every_channel_and_effort_has_a_colour_and_a_marker(theme):
    assert set(theme.channel) == set(CHANNELS)
    assert set(MARKERS) == {*theme.channel, *theme.effort}
    for names in (theme.channel, theme.effort):
        assert len({MARKERS[name] for name in names}) == len(names)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colour_scales_run_one_way_in_lightness(theme):
    steps = np.diff([luminance(colour) for colour in theme.sequential])
    assert (steps > 0).all() or (steps < 0).all()
    half = np.array([luminance(colour) for colour in theme.diverging])
    middle = half[len(half) // 2]
    assert (half < middle).sum() in (0, 4)
    assert theme.zero not in theme.sequential
    assert theme.missing not in theme.sequential


def test_a_band_keeps_its_gaps_and_shows_a_lone_layer():
    nan = np.nan
    trace = band(np.arange(5), np.array([1.0, 2, nan, 4, nan]), np.array([2.0, 3, nan, 5, nan]))
    assert list(trace.x) == [0, 1, 1, 0, None, 2.85, 3.15, 3.15, 2.85, None]
    assert list(trace.y) == [2, 3, 2, 1, None, 5, 5, 4, 4, None]


def test_translucent_keeps_the_colour():
    assert translucent("#ff8000", 0.5) == "rgba(255,128,0,0.5)"


def test_any_data_can_be_drawn_and_its_source_is_named_where_it_is_known():
    table = pd.DataFrame({"x": [1, 2]})
    assert not apply_theme(go.Figure(), LIGHT, table, title="t").layout.annotations
    table.attrs["source"] = "my file"
    assert apply_theme(go.Figure(), LIGHT, table, title="t").layout.annotations[0].text == "my file"
    ran = xr.Dataset(attrs={"run_digest": "0123456789abcdef01", "source": "not this"})
    assert apply_theme(go.Figure(), LIGHT, ran, title="t").layout.annotations[0].text == "run 0123456789abcdef"
