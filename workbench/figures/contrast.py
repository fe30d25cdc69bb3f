"""Figures of a contrast: which cells differ, with and without control of position, and by how much in a layer."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.counting import count_of
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import LayerHeatmap, points_between, scale_limit
from workbench.figures.template import THEMES, ThemeName, apply_theme
from workbench.studies.result import tables

_LABELLED = 8  # points of a volcano plot with their names
_CONTROL = {"none": "within prompts", "position": "within prompts, at equal position"}


def heatmap(ds: xr.Dataset, control: str = "position", *, theme: ThemeName = "light") -> go.Figure:
    """Draw differences a − b by layer and expert or head, in points; pale, hatched cells are not shown to differ."""
    colours = THEMES[theme]
    cell = ds.sel(control=control)
    kind = str(cell["difference"].dims[1])
    points, different = 100 * cell["difference"].values, cell["different"].values
    limit = scale_limit(points, different)
    detail = np.stack(
        [100 * cell[n].values for n in ("difference", "low", "high", "mean_a", "mean_b")] + [cell["q"].values], -1
    )
    hover = (
        f"layer %{{y}}, {kind} %{{x}}<br>%{{customdata[0]:+.2f}} points [%{{customdata[1]:+.2f}}, "
        f"%{{customdata[2]:+.2f}}], q = %{{customdata[5]:.3g}}<br>{ds.attrs['a']} %{{customdata[3]:.2f}} %, "
        f"{ds.attrs['b']} %{{customdata[4]:.2f}} %<extra></extra>"
    )
    grid = LayerHeatmap(cell["layer"].values, cell[kind].values, colours)
    grid.differences(points, different, detail, hover, limit, "not shown to differ")
    grid.less(different & (points < 0))
    bar = {"title": {"text": points_between(ds.attrs["a"], ds.attrs["b"])}}
    figure = grid.finish_differences(kind, limit, bar)
    subtitle = (
        f"{_CONTROL[control]}; {count_of(int(cell['prompts']), 'prompt')}, {int(cell['tokens_a']):,} and "
        f"{int(cell['tokens_b']):,} tokens; "
        f"{int(different.sum())} of {different.size} differ (q < 0.05, interval excludes 0)"
    )
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=grid.height)


def volcano(ds: xr.Dataset, control: str = "position", *, theme: ThemeName = "light") -> go.Figure:
    """Draw every cell by its difference and by how sure it is; filled where it differs."""
    colours = THEMES[theme]
    cell = ds.sel(control=control)
    kind = str(cell["difference"].dims[1])
    points, q = 100 * cell["difference"].values.ravel(), np.maximum(cell["q"].values.ravel(), 1e-30)
    different = cell["different"].values.ravel()
    layer, column = (v.ravel() for v in np.indices(cell["difference"].shape))
    blue = colours.colour("channel", "analysis")
    largest = np.argsort(-np.abs(np.nan_to_num(points)) * different)[: min(_LABELLED, int(different.sum()))]
    text = np.full(len(points), "", dtype=object)
    text[largest] = [f"{cell['layer'].values[layer[i]]}.{cell[kind].values[column[i]]}" for i in largest]
    figure = go.Figure(
        go.Scatter(
            x=points,
            y=-np.log10(q),
            mode="markers+text",
            text=text,
            textposition="top center",
            customdata=np.stack([cell["layer"].values[layer], column, q], -1),
            marker={
                "size": 7,
                "color": np.where(different, blue, colours.paper),
                "line": {"color": blue, "width": 1.2},
            },
            hovertemplate=f"layer %{{customdata[0]}}, {kind} %{{customdata[1]}}: %{{x:+.2f}} points, q = "
            f"%{{customdata[2]:.2g}}<extra></extra>",
        )
    )
    figure.add_hline(y=-np.log10(0.05), line={"dash": "dot", "color": colours.muted})
    figure.update_xaxes(title=f"percentage points, {ds.attrs['a']} − {ds.attrs['b']}")
    figure.update_yaxes(title="−log₁₀ q", rangemode="tozero")
    subtitle = (
        f"{_CONTROL[control]}; {int(different.sum())} of {different.size} differ; dotted: q = 0.05; labels: "
        f"layer.{kind}"
    )
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=520)


def by_layer(sets: Mapping[str, xr.Dataset], *, title: str, theme: ThemeName = "light") -> go.Figure:
    """Return the size of differences by layer, less that of noise; dashed lines have no control of position."""
    colours = THEMES[theme]
    palette = [colours.colour("channel", c) for c in ("analysis", "final", "commentary", "prompt")]
    figure = go.Figure()
    for i, (name, ds) in enumerate(sets.items()):
        controls = [c for c in ("none", "position") if c in ds["control"].values]
        for control in controls:
            cell = ds.sel(control=control)
            if not int(cell["prompts"]):
                continue
            size = np.sqrt(np.maximum(cell["size"].values ** 2 - cell["noise"].values ** 2, 0))
            figure.add_trace(
                go.Scatter(
                    x=cell["layer"].values,
                    y=100 * size,
                    name=name.replace("_", " "),
                    mode="lines+markers",
                    showlegend=control == controls[-1],
                    line={
                        "color": palette[i % len(palette)],
                        "dash": "solid" if control == controls[-1] else "dash",
                        "width": 1.8,
                    },
                    marker={"symbol": ("circle", "square", "diamond", "cross")[i % 4], "size": 7},
                    hovertemplate="layer %{x}: %{y:.2f} points, "
                    + _CONTROL[control]
                    + "<extra>%{fullData.name}</extra>",
                )
            )
    figure.update_xaxes(title="layer", dtick=max(1, len(next(iter(sets.values()))["layer"]) // 6))
    figure.update_yaxes(title="size of the difference (points)", rangemode="tozero")
    subtitle = "Root of the summed squared differences over a layer's cells, without the part of noise"
    if any("position" in ds["control"].values for ds in sets.values()):
        subtitle += "; dashed: within prompts, solid: at equal position too"
    return apply_theme(figure, colours, next(iter(sets.values())), title=title, subtitle=subtitle, height=460)


def galleries(datasets: Mapping[str, xr.Dataset], titles: Mapping[str, str]) -> Gallery:
    """Return the figures of comparisons of several quantities, whose datasets are called QUANTITY_COMPARISON.

    titles: of the figure of sizes, by quantity.
    """
    items: Gallery = {}
    for quantity, title in titles.items():
        prefix = f"{quantity}_"
        own = {name.removeprefix(prefix): ds for name, ds in datasets.items() if name.startswith(prefix)}
        items |= gallery(own, title=title, prefix=prefix)
    return items


def gallery(sets: Mapping[str, xr.Dataset], *, title: str, prefix: str = "") -> Gallery:
    """Return the heat maps of every contrast with cells, and their sizes by layer; names begin with the prefix."""
    own = {name: ds for name, ds in sets.items() if "difference" in ds and "size" in ds}
    items: Gallery = {}
    for name, ds in own.items():
        for control in (c for c in ("none", "position") if c in ds["control"].values):
            if int(ds["prompts"].sel(control=control)):
                cells = numbers(
                    ds.sel(control=control).drop_vars("control"), "_".join(map(str, ds["difference"].dims[1:]))
                )
                label = f"{prefix}{name}_{'naive' if control == 'none' else 'matched'}"
                items[label] = GalleryItem(partial(heatmap, ds, control), cells, ds)
                if control == "position":
                    items[f"{prefix}{name}_volcano"] = GalleryItem(partial(volcano, ds), cells, ds)
    if own:
        draw = partial(by_layer, own, title=title)
        items[f"{prefix}sizes"] = GalleryItem(draw, partial(_sizes, own), next(iter(own.values())))
    return items


def _sizes(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    return pd.concat([tables(ds)["control_layer"].assign(comparison=name) for name, ds in sets.items()])
