"""Figures of two runs on the same transcripts."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import contrast
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.intervals import lines, rows
from workbench.figures.template import ThemeName
from workbench.studies.statistics import ALPHA

ANSWER = ("analysis", "commentary", "final")
_FEATURES = 20


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


def by_effort(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the difference of log-probability in every channel of an answer at every effort."""
    name = "logprob_difference"
    pairs = [
        (e, c) for e in map(str, ds["effort"].values) for c in ANSWER if np.isfinite(ds[name].sel(effort=e, channel=c))
    ]
    ends = {
        n: [float(ds[n].sel(effort=e, channel=c)) for e, c in pairs]
        for n in (name, *(f"{name}_{e}" for e in ("low", "high", "q")))
    }
    table = xr.Dataset(
        {n: ("row", np.array(values)) for n, values in ends.items()}, {"row": [f"{e}, {c}" for e, c in pairs]}, ds.attrs
    )
    return rows(
        table,
        name,
        "row",
        title="Log-probability of the same tokens, a − b",
        subtitle="mean over prompts, with 95 % intervals; filled: q is at most 0.05",
        x_title="difference (nat a token)",
        theme=theme,
    )


def features(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the largest differences of a recorded activation's features, with their intervals."""
    flat = ds.isel(control=0)[["difference", "low", "high", "q"]].stack(cell=("layer", "feature"))
    size = np.abs(np.nan_to_num(flat["difference"].values)) * (flat["q"].values <= ALPHA)
    largest = flat.isel(cell=np.argsort(-size, kind="stable")[:_FEATURES])
    names = [f"layer {layer} feature {feature}" for layer, feature in largest["cell"].values]
    table = xr.Dataset(
        {n: ("row", largest[n].values) for n in ("difference", "low", "high", "q")}, {"row": names}, ds.attrs
    )
    return rows(
        table,
        "difference",
        "row",
        low="low",
        high="high",
        title=str(ds.attrs["title"]),
        subtitle=f"the {len(names)} largest, with 95 % intervals; filled: q is at most {ALPHA}",
        x_title="difference, a − b",
        theme=theme,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    ds = datasets["agreement"]
    items: Gallery = {}
    if "agreement" in ds:
        items["agreement"] = GalleryItem(partial(agreement, ds), numbers(ds, "channel_layer"), ds)
    if "logprob_difference" in (efforts := datasets.get("efforts", xr.Dataset())):
        items["efforts"] = GalleryItem(partial(by_effort, efforts), numbers(efforts, "effort_channel"), efforts)
    for name, one in datasets.items():
        if name.startswith("features_in_"):
            items[name] = GalleryItem(partial(features, one), numbers(one, "control_layer_feature"), one)
    titles = {"routing": "Size of load differences by layer", "sinks": "Size of sink differences by layer"}
    return items | contrast.galleries(datasets, titles)
