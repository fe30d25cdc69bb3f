"""Figures of the risk difference study: the difference of each expert by control, and what matching leaves of it."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.counting import count_of
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import difference_of_labels
from workbench.figures.template import THEMES, ThemeName, apply_theme
from workbench.studies.risk_difference import strictest


def heatmap(ds: xr.Dataset, control: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the risk difference by layer and expert, in percentage points; hatched cells are not shown to differ."""
    colours, cell = THEMES[theme], ds.sel(control=control)
    matched_means = "mean_a" in cell and np.isfinite(cell["mean_a"]).any()
    rates = ("mean_a", "mean_b") if matched_means else ("rate_a", "rate_b")
    sides = "selected at %{customdata[3]:.1f} % against %{customdata[4]:.1f} % of tokens"
    figure, height = difference_of_labels(cell, "expert", rates, sides, "risk difference (points)", colours)
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=_rests(cell, control), height=height)


def matched(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the difference under the strictest control that can be tested against the pooled one, a point an expert."""
    colours, control = THEMES[theme], strictest(ds)
    pooled, cell = ds.sel(control="pooled"), ds.sel(control=control)
    x, y = (100 * one["difference"].values.ravel() for one in (pooled, cell))
    layer, expert = (v.ravel() for v in np.indices(cell["difference"].shape))
    blue, different = colours.colour("channel", "analysis"), cell["different"].values.ravel()
    limit = float(max(np.nanmax(np.abs(x)), np.nanmax(np.abs(np.nan_to_num(y))), 0.1)) * 1.05
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=y,
            mode="markers",
            customdata=np.stack([layer, expert], -1),
            marker={
                "size": 7,
                "color": np.where(different, blue, colours.paper),
                "line": {"color": blue, "width": 1.2},
            },
            hovertemplate="layer %{customdata[0]} expert %{customdata[1]}: pooled %{x:+.2f}, matched %{y:+.2f} points"
            "<extra></extra>",
        )
    )
    ends = [-limit, limit]
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", line={"dash": "dot", "color": colours.muted}, showlegend=False)
    )
    figure.update_xaxes(title="pooled risk difference (points)", range=ends)
    figure.update_yaxes(title=f"{_label(control)} (points)", range=ends)
    subtitle = f"{_rests(cell, control)}; filled: differs; dotted: equal"
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=560)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return the heat map of each control, and the comparison of the pooled with the strictest one."""
    items: Gallery = {}
    for name, ds in datasets.items():
        for control in map(str, ds["control"].values):
            cells = numbers(ds.sel(control=control).drop_vars("control"), "layer_expert")
            items[f"{name}_{control.replace(' ', '_')}"] = GalleryItem(partial(heatmap, ds, control), cells, ds)
        items[f"{name}_matched"] = GalleryItem(partial(matched, ds), numbers(ds, "control_layer_expert"), ds)
    return items


def _label(control: str) -> str:
    return {"pooled": "pooled", "token": "unpaired, at the same token ids"}.get(control, f"within {control}")


def _rests(cell: xr.Dataset, control: str) -> str:
    n = int(cell["different"].sum())
    return (
        f"{_label(control)}; {count_of(int(cell['prompts']), 'prompt')}, {int(cell['tokens_a']):,} and "
        f"{int(cell['tokens_b']):,} tokens; {n} of {cell['different'].size} experts differ"
    )
