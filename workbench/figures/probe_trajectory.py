"""The figure of probes along the chain of thought: AUC of every layer, beside the best baseline."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme


def trajectory(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw AUC against the share of the analysis: a line for each layer, with limits; the best baseline is dashed."""
    colours = THEMES[theme]
    figure = go.Figure()
    share, layers = ds["share"].values.astype(float), [int(v) for v in ds["layer"].values]
    for number, layer in enumerate(layers):
        one = ds.sel(layer=layer)
        auc, low, high = (one[name].values.astype(float) for name in ("auc", "auc_low", "auc_high"))
        depth = number / (len(layers) - 1) if len(layers) > 1 else 1
        figure.add_trace(
            go.Scatter(
                x=share,
                y=auc,
                name=f"layer {layer}",
                mode="lines+markers",
                opacity=0.35 + 0.65 * depth,
                line={"color": colours.colour("channel", "analysis")},
                error_y={"array": high - auc, "arrayminus": auc - low, "thickness": 1.2},
                hovertemplate=f"layer {layer}, %{{x:.0%}}: %{{y:.3f}}<extra></extra>",
            )
        )
    best = ds["baseline"].max("source").values.astype(float)
    dash = {"color": colours.muted, "dash": "dash"}
    figure.add_trace(go.Scatter(x=share, y=best, name="best baseline", mode="lines", line=dash))
    limit = float(np.nanmin(ds["auc_low"].values, initial=1.0))
    lowest = 0.35 if limit > 0.35 else limit - 0.02  # every interval is seen to its end
    figure.update_xaxes(title="share of the channel read", tickformat=".0%")
    figure.update_yaxes(title="AUC on held-out prompts", range=[lowest, 1.02])
    subtitle = f"{ds.attrs['rests_on']}; 95 % intervals over prompts"
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=420)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return the figure of the trajectory, and its data."""
    return {name: GalleryItem(partial(trajectory, ds), numbers(ds, "layer_share"), ds) for name, ds in datasets.items()}
