"""Figures of sentence importance: the sentences of a conversation with their effects, and the forced answers."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme

_LONGEST = 48  # characters of a sentence that are shown


def conversation(ds: xr.Dataset, name: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the sentences of a conversation from top to bottom: effect on the own answer, and the forced answer's share.

    Sentences that were never written otherwise have no effect to show.
    """
    colours = THEMES[theme]
    own = ds.isel(sentence=np.flatnonzero(ds["conversation"].values == name))
    blue, green = colours.colour("channel", "analysis"), colours.colour("channel", "final")
    texts = [str(text) for text in own["text"].values]
    labels = [f"{i + 1}. {t if len(t) <= _LONGEST else t[: _LONGEST - 1] + '…'}" for i, t in enumerate(texts)]
    effect, low, high = (own[v].values.astype(float) for v in ("effect", "low", "high"))
    figure = go.Figure(
        go.Scatter(
            x=effect,
            y=labels,
            mode="markers",
            name="change due to the sentence",
            error_x={"array": high - effect, "arrayminus": effect - low, "color": blue, "thickness": 1.6},
            marker={
                "size": 10,
                "color": np.where(own["q"].values <= 0.05, blue, colours.paper),
                "line": {"color": blue, "width": 1.6},
            },
            customdata=np.stack([own["kl"].values, own["q"].values, own["kept"].values, own["other"].values], -1),
            hovertemplate="%{y}<br>effect %{x:+.2f}; divergence %{customdata[0]:.2f} nats, q %{customdata[1]:.3f}<br>"
            "%{customdata[2]} kept, %{customdata[3]} other<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=own["forced"].values,
            y=labels,
            mode="lines+markers",
            name="own answer, forced after the sentence",
            line={"color": green, "dash": "dot"},
            marker={"symbol": "diamond", "size": 7},
            hovertemplate="%{y}<br>forced answer is the own one: %{x:.2f}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": colours.muted, "width": 1})
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(title="probability of the own answer, and its change", range=[-1.05, 1.05])
    subtitle = f"{name}; 95 % intervals over samples, filled: q ≤ 0.05 over all sentences"
    height = 240 + 32 * len(labels)
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=height)


def settled(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw for each conversation after which share of its sentences the forced answer is settled."""
    colours = THEMES[theme]
    names = [str(v) for v in ds["conversation"].values]
    figure = go.Figure(
        go.Scatter(
            x=ds["committed"].values,
            y=names,
            mode="markers",
            marker={"size": 9, "color": colours.colour("channel", "final")},
            hovertemplate="%{y}: %{x:.0%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="share of sentences before commitment", range=[-0.05, 1.05])
    figure.update_yaxes(autorange="reversed", ticks="")
    height = 200 + 26 * len(names)
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=ds.attrs["rests_on"], height=height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a figure for each conversation, and one of all."""
    items: Gallery = {}
    if "sentences" in datasets:
        ds = datasets["sentences"]
        for number, name in enumerate(dict.fromkeys(map(str, ds["conversation"].values))):
            draw = partial(conversation, ds, name)
            items[f"conversation_{number + 1}"] = GalleryItem(draw, numbers(ds, "sentence"), ds)
    if "conversations" in datasets:
        ds = datasets["conversations"]
        items["settled"] = GalleryItem(partial(settled, ds), numbers(ds, "conversation"), ds)
    return items
