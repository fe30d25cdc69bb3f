"""Figures of receiver heads: the kurtosis of each head beyond chance, and the sentences that these heads attend to."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import experiments
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme

_MOST = 20  # sentences that are shown
_LONGEST = 60  # characters of a sentence that are shown


def sentences(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the sentences that the heads attend to most, with their scores."""
    colours = THEMES[theme]
    chosen = ds.isel(sentence=np.argsort(-ds["score"].values)[:_MOST])
    names = [str(name) for name in chosen["sentence"].values]
    labels = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
    figure = go.Figure(
        go.Scatter(
            x=chosen["score"].values,
            y=[f"{label} " for label in labels],
            text=names,
            mode="markers",
            marker={"size": 9, "color": colours.colour("channel", "analysis")},
            hovertemplate="%{text}: %{x:+.2f}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": colours.muted, "width": 1})
    figure.update_xaxes(title="attention received (standard deviations within its analysis)")
    figure.update_yaxes(autorange="reversed", ticks="")
    height = 200 + 26 * len(labels)
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=ds.attrs["rests_on"], height=height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a heat map of heads, and the sentences with the largest scores."""
    items = experiments.gallery({name: ds for name, ds in datasets.items() if name != "sentences"})
    if "sentences" in datasets:
        ds = datasets["sentences"]
        items["sentences"] = GalleryItem(partial(sentences, ds), numbers(ds, "sentence"), ds)
    return items
