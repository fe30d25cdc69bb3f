"""Figures of two runs on the same transcripts."""

from collections.abc import Mapping
from functools import partial

import plotly.graph_objects as go
import xarray as xr

from workbench.figures import contrast
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.intervals import lines
from workbench.figures.template import ThemeName


def agreement(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the share of chosen experts that both runs chose, by layer and channel."""
    labels = [c for c in map(str, ds["channel"].values) if int(ds["tokens"].sel(channel=c)) and c != "frame"]
    return lines(
        ds,
        "agreement",
        "layer",
        "channel",
        labels=labels,
        title="Agreement of two routers",
        subtitle="|experts of a ∩ experts of b| / k, mean over prompts; 95 % bands",
        y_title="agreement",
        theme=theme,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the numbers behind each."""
    ds = datasets["agreement"]
    found: Gallery = {}
    if "agreement" in ds:
        found["agreement"] = GalleryItem(partial(agreement, ds), numbers(ds, "channel_layer"), ds)
    for kind, title in (
        ("routing", "Size of load differences by layer"),
        ("sinks", "Size of sink differences by layer"),
    ):
        own = {n.removeprefix(f"{kind}_"): ds for n, ds in datasets.items() if n.startswith(f"{kind}_")}
        found |= contrast.gallery(own, title=title, prefix=f"{kind}_")
    return found
