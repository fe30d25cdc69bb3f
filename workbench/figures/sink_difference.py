"""Figures of the sink difference study: the difference of each head by layer, for each control."""

from collections.abc import Mapping
from functools import partial

import plotly.graph_objects as go
import xarray as xr

from workbench.counting import count_of
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import difference_of_labels
from workbench.figures.template import THEMES, ThemeName, apply_theme


def heatmap(ds: xr.Dataset, control: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the difference of sink attention by layer and head, in percentage points; hatched: not shown to differ."""
    colours, cell = THEMES[theme], ds.sel(control=control)
    sides = "sink attention %{customdata[3]:.1f} % against %{customdata[4]:.1f} %"
    figure, height = difference_of_labels(cell, "head", ("mean_a", "mean_b"), sides, "sink attention (points)", colours)
    different = cell["different"].values
    subtitle = (
        f"within {control}; {count_of(int(cell['prompts']), 'prompt')}; {int(different.sum())} of {different.size} "
        f"heads differ; mean positions {float(ds['position_a']):.0f} and {float(ds['position_b']):.0f}"
    )
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a heat map for each control."""
    items: Gallery = {}
    for name, ds in datasets.items():
        for control in map(str, ds["control"].values):
            key = f"{name}_{control.replace(' ', '_')}"
            items[key] = GalleryItem(partial(heatmap, ds, control), numbers(ds, "control_layer_head"), ds)
    return items
