"""The figure of the experts' direct effects on logits: the largest effect of every expert, and its tokens on hover."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import default
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.template import THEMES, ThemeName, apply_theme


def largest(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the largest direct effect of each expert on a logit; hovering names the tokens."""
    colours = THEMES[theme]
    values = ds["top_logit"].isel(rank=0).values.astype(float)
    texts = ds["top_text"].values
    promoted = np.array(
        [[", ".join(repr(str(text)) for text in cell[:5]) for cell in row] for row in texts], dtype=object
    )
    grid = LayerHeatmap(ds["layer"].values, ds["expert"].values, colours)
    grid.colour(
        values, promoted[..., None], "layer %{y}, expert %{x}: %{z:.2f} logits<br>%{customdata[0]}<extra></extra>"
    )
    grid.missing(np.isnan(values))
    bar = {"title": {"text": "largest effect (logits)"}}
    top = float(np.nanmax(values, initial=0.01))
    figure = grid.finish("expert", {"cmin": 0, "cmax": top, "colorscale": colours.sequential, "colorbar": bar})
    subtitle = str(ds.attrs.get("rests_on", ""))
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=grid.height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return the figures and their data: of experts, and of a layer's neurons if they are there."""
    ds = datasets["logits"]
    items: Gallery = {"largest": GalleryItem(partial(largest, ds), numbers(ds, "layer_expert_rank"), ds)}
    if "neurons" in datasets:
        own = datasets["neurons"].isel(rank=0)[["top_logit", "bottom_logit"]]
        items["neurons"] = GalleryItem(partial(default.figure, own, "top_logit"), numbers(own, "expert_neuron"), own)
    return items
