"""Figures of generated answers: the change of each measure with its interval, over the range of random controls."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import THEMES, ThemeName, apply_theme


def figure(ds: xr.Dataset, measure: str, *, theme: ThemeName = "light") -> go.Figure:
    """Draw a row for each intervention: its change with the 95 % interval, beside a dot for each random control."""
    colours, cell = THEMES[theme], ds.sel(measure=measure)
    blue = colours.colour("channel", "analysis")
    names = [str(v) for v in ds["intervention"].values]
    made = go.Figure()
    n = ds.sizes["control"]
    if n:
        made.add_trace(
            go.Scatter(
                x=cell["random"].values.ravel(),
                y=np.tile(names, n),
                mode="markers",
                name="random controls",
                marker={"symbol": "line-ns", "size": 12, "line": {"color": colours.muted, "width": 1}},
                hovertemplate="%{y}, random control: %{x:+.3g}<extra></extra>",
            )
        )
    change, low, high = (cell[name].values.astype(float) for name in ("change", "low", "high"))
    made.add_trace(
        go.Scatter(
            x=change,
            y=names,
            mode="markers",
            name="chosen, 95 % interval over prompts",
            error_x={"array": np.nan_to_num(high - change), "arrayminus": np.nan_to_num(change - low), "color": blue},
            marker={
                "size": 10,
                "color": np.where(cell["p_family"].values <= 0.05, blue, colours.paper),
                "line": {"color": blue, "width": 1.6},
            },
            hovertemplate="%{y}: %{x:+.3g}<extra></extra>",
        )
    )
    made.add_vline(x=0, line={"color": colours.muted, "width": 1})
    made.update_yaxes(autorange="reversed", ticks="")
    made.update_xaxes(title=f"change of {measure}")
    subtitle = (
        f"{ds.attrs['rests_on']}; {float(cell['unedited']):.3g} without an edit; filled: beyond random controls "
        "(p ≤ 0.05 for all doses)"
    )
    height = 220 + 40 * len(names)
    title = f"{measure[:1].upper()}{measure[1:]}: {ds.attrs['title'][:1].lower()}{ds.attrs['title'][1:]}"
    return apply_theme(made, colours, ds, title=title, subtitle=subtitle, height=height)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a figure for each measure that has a value."""
    items: Gallery = {}
    for name, ds in datasets.items():
        for measure in map(str, ds["measure"].values):
            if np.isfinite(ds["change"].sel(measure=measure)).any():
                label = f"{name}_{measure.replace(' ', '_')}"
                table = numbers(ds.sel(measure=measure).drop_vars("measure"), "intervention")
                items[label] = GalleryItem(partial(figure, ds, measure), table, ds)
    return items
