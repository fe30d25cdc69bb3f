"""Figures of the channels study: analysis against final, and the geometry of recorded activations."""

from collections.abc import Mapping
from functools import partial

import plotly.graph_objects as go
import xarray as xr

from workbench.figures import contrast
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme, band, translucent


def probe(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw AUC of the probe by layer with the range of its folds, beside that of halves of the analysis."""
    colours = THEMES[theme]
    blue, red = colours.colour("channel", "analysis"), colours.colour("channel", "final")
    layers = ds["layer"].values
    figure = go.Figure(
        band(layers, ds["auc_low"].values, ds["auc_high"].values, fillcolor=translucent(blue, 0.2), name="folds")
    )
    for name, label, colour in (
        ("auc", f"{ds.attrs['a']} against {ds.attrs['b']}", blue),
        ("auc_half", f"halves of {ds.attrs['a']}", red),
    ):
        figure.add_trace(
            go.Scatter(
                x=layers, y=ds[name].values, name=label, mode="lines+markers", line={"color": colour, "width": 1.8}
            )
        )
    figure.add_hline(y=0.5, line={"dash": "dot", "color": colours.muted})
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="AUC, held out by prompt", range=[0.45, 1.02])
    return apply_theme(
        figure,
        colours,
        ds,
        title=ds.attrs["title"],
        subtitle="Linear probe; the band spans the folds; dotted: chance",
        height=430,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    items: Gallery = {}
    for kind, title in (
        ("routing", "Size of routing differences by layer"),
        ("sinks", "Size of sink differences by layer"),
    ):
        own = {n.removeprefix(f"{kind}_"): ds for n, ds in datasets.items() if n.startswith(f"{kind}_")}
        items |= contrast.gallery(own, title=title, prefix=f"{kind}_")
    for name, ds in datasets.items():
        if "auc" in ds:
            items[name] = GalleryItem(partial(probe, ds), numbers(ds, "layer"), ds)
    return items
