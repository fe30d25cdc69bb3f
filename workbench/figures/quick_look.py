"""Figures of a quick look: any selection's shares or means by layer and expert (or head), without intervals."""

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.heatmap import LayerHeatmap, experts_of_layers
from workbench.figures.template import MARKERS, THEMES, ThemeName, apply_theme
from workbench.studies.result import provenance

Measure = Literal["relative", "load", "gates", "lift", "mass", "spread"]
_CLIP = 4.0  # of loads relative to uniform
_TITLES = {
    "relative": "Expert load relative to uniform",
    "load": "Expert load",
    "gates": "Gate weight by expert",
    "lift": "Expert load relative to the whole run",
    "mass": "Sink attention",
    "spread": "Spread of the sink attention over tokens",
}
# short enough for two figures side by side
_MEANINGS = {
    "relative": "share of routed slots × experts",
    "load": "share of routed slots × experts",
    "gates": "share of the selection's gate weight",
    "lift": "load here over load in all content",
    "mass": "mean probability on the learned sink",
    "spread": "standard deviation over tokens",
}


def heatmap(
    ds: xr.Dataset,
    measure: Measure,
    *,
    marked: tuple[int, int] | None = None,
    top: float | None = None,
    theme: ThemeName = "light",
) -> go.Figure:
    """Return a measure of every layer and expert (or head); `relative` and lift in doublings.

    marked: the (layer, column) that gets a frame. top: of the colour scale of sink attention (%), so that several
    figures share one; the largest value by default.
    """
    colours = THEMES[theme]
    variable = ds["load" if measure == "relative" else measure]
    column = str(variable.dims[1])
    values = variable.values
    grid = LayerHeatmap(ds["layer"].values, ds[column].values, colours)
    where = f"layer %{{y}}, {column} %{{x}}<br>"
    bar: dict[str, Any]
    if measure in ("load", "gates"):
        detail = np.stack([values * experts_of_layers(values)[:, None], 100 * values], -1)
        hover = where + "%{customdata[0]:.2f} × uniform<br>%{customdata[1]:.2f} %<extra></extra>"
        figure = grid.loads(values, detail, hover, _CLIP)
    elif measure in ("lift", "relative"):
        ratio = values * (experts_of_layers(values)[:, None] if measure == "relative" else 1)
        title = "load (× whole run)" if measure == "lift" else "load (× uniform)"
        with np.errstate(divide="ignore"):
            doublings = np.clip(np.log2(ratio), -2, 2)
        grid.colour(doublings, ratio[..., None], where + f"{title}: %{{customdata[0]:.2f}}<extra></extra>")
        grid.fill(ratio == 0, colours.zero, "never selected")
        bar = {"title": {"text": title}, "tickvals": [-2, -1, 0, 1, 2], "ticktext": ["≤ ¼", "½", "1", "2", "≥ 4"]}
        grid.missing(np.isnan(values))
        figure = grid.finish_differences(column, 2, bar)
    else:
        grid.colour(100 * values, 100 * values[..., None], where + "%{customdata[0]:.2f} %<extra></extra>")
        top = float(np.nanmax(100 * values, initial=0.1)) if top is None else top
        title = "sink attention (%)" if measure == "mass" else "standard deviation (points)"
        grid.missing(np.isnan(values))
        scale = {"cmin": 0, "cmax": top, "colorscale": colours.sequential, "colorbar": {"title": {"text": title}}}
        figure = grid.finish(column, scale)
    if marked is not None:
        grid.frame(*marked)
    subtitle = f"{ds.attrs['tokens']:,} tokens, pooled; {_MEANINGS[measure]}"
    title = f"{_TITLES[measure]}: {ds.attrs['title']}"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=grid.height)


def position_curve(rows: pd.DataFrame, digest: str, layer: int, head: int, *, theme: ThemeName = "light") -> go.Figure:
    """Draw one head's sink attention by position, one line for each channel. rows: [position, channel]."""
    colours = THEMES[theme]
    figure = go.Figure()
    for channel in map(str, rows.columns):
        figure.add_trace(
            go.Scatter(
                x=rows.index,
                y=100 * rows[channel],
                name=channel,
                mode="lines+markers",
                line={"color": colours.colour("channel", channel), "width": 1.8},
                marker={"symbol": MARKERS.get(channel, "circle"), "size": 7},
                hovertemplate="from position %{x}: %{y:.2f} %<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_xaxes(title="position (first of its bin)", type="log", tickvals=list(rows.index))
    figure.update_yaxes(title="sink attention (%)", rangemode="tozero")
    origin = xr.Dataset(attrs=provenance("sinks", "", digest, 0, {}))
    subtitle = "Mean over the run's first tokens, bins double; no interval"
    return apply_theme(
        figure, colours, origin, title=f"Layer {layer}, head {head} by position", subtitle=subtitle, height=430
    )
