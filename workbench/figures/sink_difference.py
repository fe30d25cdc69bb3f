"""Figures of the sink difference study: the difference of each head by layer, for each control."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.template import THEMES, ThemeName, apply_theme


def heatmap(ds: xr.Dataset, control: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the difference of sink attention by layer and head, in percentage points; hatched: not shown to differ."""
    colours, cell = THEMES[theme], ds.sel(control=control)
    points, different = 100 * cell["difference"].values, cell["different"].values
    limit = float(np.abs(points[different]).max(initial=0.1))
    percent = [100 * cell[name].values for name in ("difference", "low", "high", "mean_a", "mean_b")]
    detail = np.stack([*percent, cell["q"].values], -1)
    hover = (
        "layer %{y}, head %{x}<br>%{customdata[0]:+.2f} points [%{customdata[1]:+.2f}, %{customdata[2]:+.2f}], "
        "q = %{customdata[5]:.3g}<br>sink attention %{customdata[3]:.1f} % against %{customdata[4]:.1f} %"
        "<extra></extra>"
    )
    grid = LayerHeatmap(cell["layer"].values, cell["head"].values, colours)
    grid.differences(points, different, detail, hover, limit, "not shown to differ")
    grid.less(different & (points < 0))
    figure = grid.finish_differences("head", limit, {"title": {"text": "sink attention (points)"}})
    subtitle = (
        f"within {control}; {int(cell['prompts'])} prompts; {int(different.sum())} of {different.size} heads differ; "
        f"mean positions {float(ds['position_a']):.0f} and {float(ds['position_b']):.0f}"
    )
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=grid.height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a heat map for each control."""
    items: Gallery = {}
    for name, ds in datasets.items():
        for control in map(str, ds["control"].values):
            key = f"{name}_{control.replace(' ', '_')}"
            items[key] = GalleryItem(partial(heatmap, ds, control), numbers(ds, "control_layer_head"), ds)
    return items
