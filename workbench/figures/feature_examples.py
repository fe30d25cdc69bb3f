"""Figures of features: the share of tokens that have each, histograms of these shares and of one feature's activations.

Reference: the histograms of activation density and of activations on the feature pages of Neuronpedia.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of
from workbench.figures import default
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme

_BINS = 40


def density_histogram(ds: xr.Dataset, *, chosen: int | None = None, theme: ThemeName = "light") -> go.Figure:
    """Return a histogram of the activation density of features, by channel, on a logarithmic axis.

    The density of a feature is the share of tokens at which its activation is above 0. ds: `share` [channel feature].
    chosen: a feature whose densities are marked.
    """
    colours, figure = THEMES[theme], go.Figure()
    channels = [name for name in ds["channel"].values.tolist() if name != "frame"]
    share = ds["share"].sel(channel=channels).transpose("channel", "feature").values.astype(float)
    positive = np.log10(share[share > 0])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (-1.0, 0.0)
    edges = np.linspace(low - 1e-6, max(high, low + 0.1) + 1e-6, _BINS + 1)
    never = {}
    for channel, own in zip(channels, share, strict=True):
        count, _ = np.histogram(np.log10(own[own > 0]), edges)
        never[channel] = int((own <= 0).sum())
        figure.add_trace(
            go.Scatter(
                x=10 ** np.repeat(edges, 2),
                y=np.concatenate([[0], np.repeat(count, 2), [0]]),
                mode="lines",
                name=channel,
                line={"color": colours.colour("channel", channel), "width": 2},
                hovertemplate=f"{channel}, density %{{x:.2g}}: %{{y}} features<extra></extra>",
            )
        )
    if chosen is not None and chosen in ds["feature"].values:
        for channel, value in zip(channels, ds["share"].sel(feature=chosen, channel=channels).values, strict=True):
            if value > 0:
                line = {"color": colours.colour("channel", channel), "dash": "dot"}
                figure.add_vline(x=float(value), line=line)
    figure.update_xaxes(type="log", title="density (share of tokens)", exponentformat="power", dtick=1)
    figure.update_yaxes(title="features", rangemode="tozero")
    parts = [f"{count:,} never active in {channel}" for channel, count in never.items() if count]
    dotted = [] if chosen is None else [f"dotted: feature {chosen}"]
    subtitle = "; ".join([count_of(share.shape[1], "feature"), *parts, *dotted])
    return apply_theme(figure, colours, ds, title="Activation density of features", subtitle=subtitle, height=400)


def activation_histogram(
    values: Float[np.ndarray, " token"],
    weights: Float[np.ndarray, " token"],
    *,
    feature: int,
    sampled: bool,
    theme: ThemeName = "light",
) -> go.Figure:
    """Return a histogram of the activations of one feature, with the number of tokens on a logarithmic axis.

    values: activations above 0. weights: how many tokens each of them stands for. sampled: whether they are a random
    sample of the tokens that have the feature.
    """
    colours = THEMES[theme]
    count, edges = np.histogram(values, bins=_BINS if len(values) >= 200 else 12, weights=weights)
    shown = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=np.where(count > 0, count, np.nan),
        width=np.diff(edges),
        marker={"color": colours.colour("channel", "analysis"), "line": {"width": 0}},
        name="tokens",
        showlegend=False,
        hovertemplate="activation %{x:.2f}: %{y:,.0f} tokens<extra></extra>",
    )
    figure = go.Figure(shown)
    figure.update_xaxes(title="activation", rangemode="tozero")
    figure.update_yaxes(type="log", title="tokens")
    total = f"{weights.sum():,.0f} active tokens"
    subtitle = f"random sample of {len(values)} of {total}" if sampled else total
    source = xr.Dataset()
    title = f"Activations of feature {feature}"
    return apply_theme(figure, colours, source, title=title, subtitle=subtitle, height=400)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    ds = datasets["features"]
    table = numbers(ds, "channel_feature")
    return {
        "density": GalleryItem(partial(density_histogram, ds), table, ds),
        "share": GalleryItem(partial(default.figure, ds, "share"), table, ds),
    }
