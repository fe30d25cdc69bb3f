"""Figures of the sinks study: sink attention by layer and head, by position, and where channels and efforts differ."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.counting import count_of
from workbench.figures import contrast
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.intervals import lines
from workbench.figures.template import THEMES, ThemeName, apply_theme


def mass_heatmap(ds: xr.Dataset, channel: str, effort: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the probability that each head leaves on its sink, in one cell."""
    colours = THEMES[theme]
    cell = ds.sel(channel=channel, effort=effort)
    values = 100 * cell["mass"].values
    detail = np.stack([100 * cell[n].values for n in ("mass", "mass_low", "mass_high", "spread")], -1)
    grid = LayerHeatmap(cell["layer"].values, cell["head"].values, colours)
    hover = (
        "layer %{y}, head %{x}<br>%{customdata[0]:.2f} % [%{customdata[1]:.2f}, %{customdata[2]:.2f}], "
        "spread %{customdata[3]:.2f}<extra></extra>"
    )
    grid.colour(values, detail, hover)
    grid.missing(np.isnan(values))
    bar = {"title": {"text": "sink attention (%)"}}
    figure = grid.finish(
        "head",
        {"cmin": 0, "cmax": float(np.nanmax(values, initial=0.1)), "colorscale": colours.sequential, "colorbar": bar},
    )
    windowed = [str(int(v)) for v, w in zip(ds["layer"].values, ds["window"].values, strict=True) if w]
    subtitle = (
        f"{int(cell['tokens']):,} tokens of {count_of(int(cell['prompts']), 'prompt')}; layers with a window: "
        f"{', '.join(windowed) or 'none'}; the table has intervals"
    )
    return apply_theme(
        figure, colours, ds, title=f"Sink attention: {channel}, {effort} effort", subtitle=subtitle, height=grid.height
    )


def by_position(ds: xr.Dataset, layer: int, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the sink attention by position in one layer, one line for each channel."""
    cell = ds.sel(layer=layer).assign_attrs(ds.attrs)
    cell = cell.assign({name: 100 * cell[name] for name in ("mass", "mass_low", "mass_high")})
    cell = cell.assign_coords(bin=np.maximum(cell["bin"].values, 1))
    labels = [c for c in map(str, ds["channel"].values) if int(ds["tokens"].sel(channel=c).sum()) and c != "frame"]
    return lines(
        cell,
        "mass",
        "bin",
        "channel",
        labels=labels,
        title=f"Sink attention by position, layer {layer}",
        x_title="position (first of its bin)",
        subtitle="Mean over heads; bins double; 95 % bands, jackknife over prompts",
        y_title="sink attention (%)",
        log_x=True,
        theme=theme,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    mass = datasets["mass"]
    items: Gallery = {}
    for channel in map(str, mass["channel"].values):
        for effort in map(str, mass["effort"].values):
            cell = mass.sel(channel=channel, effort=effort)
            if int(cell["tokens"]):
                draw = partial(mass_heatmap, mass, channel, effort)
                items[f"mass_{channel}_{effort}"] = GalleryItem(draw, numbers(cell, "layer_head"), mass)
    if "position" in datasets:
        position = datasets["position"]
        for layer in map(int, position["layer"].values):
            draw = partial(by_position, position, layer)
            items[f"position_layer_{layer}"] = GalleryItem(
                draw, numbers(position.sel(layer=layer), "channel_bin"), position
            )
    return items | contrast.gallery(datasets, title="Size of sink differences by layer")
