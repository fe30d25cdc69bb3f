"""Figures of the Jacobian lens: divergence from the model's own prediction by layer and lens, and its changes."""

from collections.abc import Mapping
from functools import partial

import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.intervals import lines
from workbench.figures.template import ThemeName


def divergence(ds: xr.Dataset, group: str, *, theme: ThemeName = "light") -> go.Figure:
    """Return lines of the divergence of each lens, for the tokens of one group."""
    return lines(
        ds.sel(group=group),
        "divergence",
        "layer",
        "lens",
        title=f"Lenses, tokens of {group}",
        subtitle=f"{ds.attrs['rests_on']}; 95 % intervals",
        y_title="KL divergence (nat)",
        theme=theme,
    )


def change(ds: xr.Dataset, which: str, *, theme: ThemeName = "light") -> go.Figure:
    """Return lines of one comparison of lenses for each group."""
    return lines(
        ds.sel(which=which),
        "change",
        "layer",
        "group",
        title=which,
        subtitle=f"{ds.attrs['rests_on']}; 95 % intervals",
        y_title="change of KL divergence (nat)",
        low="low",
        high="high",
        theme=theme,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a figure for each group, and one for each comparison of lenses."""
    lenses, comparisons = datasets["lenses"], datasets["comparisons"]
    items: Gallery = {}
    for group in map(str, lenses["group"].values):
        own = lenses.sel(group=[group])
        items[f"lenses_{group}"] = GalleryItem(
            partial(divergence, lenses, group), numbers(own, "lens_group_layer"), own
        )
    for which in map(str, comparisons["which"].values):
        own = comparisons.sel(which=[which])
        items[f"comparisons_{which}"] = GalleryItem(
            partial(change, comparisons, which), numbers(own, "which_group_layer"), own
        )
    return items
