"""Figures of a study that has none of its own: each variable by its axes, with its interval where it has one.

One axis of labels is drawn as rows, one of numbers as a line, two as a line for each label or as a heat map. Further
axes give a figure for each of their labels.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.gallery import Gallery, GalleryItem
from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.intervals import lines, rows
from workbench.figures.template import THEMES, ThemeName, apply_theme

_MOST_LINES = 8  # more labels than this are a heat map
_MOST_TICKS = 16  # labels below a heat map
_NAMES = ("expert", "head", "neuron", "feature")  # axes whose numbers are names: no line leads from one to the next


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a figure for each variable of each dataset that has an axis, and its data."""
    items: Gallery = {}
    for name, ds in datasets.items():
        for label, cell, variable in _cells(ds):
            draw, table = partial(figure, cell, variable), partial(_table, cell, variable)
            items["_".join([name, variable, *label])] = GalleryItem(draw, table, cell)
    return items


def figure(ds: xr.Dataset, name: str, *, theme: ThemeName = "light") -> go.Figure:
    """Return the figure of a variable with one or two axes."""
    variable = ds[name]
    units = str(variable.attrs.get("units", "1"))
    long_name = str(variable.attrs.get("long_name", name))
    value = long_name + (f" ({units})" if units != "1" else "")
    dims = sorted(map(str, variable.dims), key=lambda dim: (_is_text(ds, dim), -ds.sizes[dim]))
    drawn_intervals = f"{name}_low" in ds and (len(dims) == 1 or _has_lines(ds, dims))
    subtitle = str(variable.attrs.get("definition", "")) + ("; 95 % intervals" if drawn_intervals else "")
    title = ": ".join(filter(None, (str(ds.attrs.get("title", "")), f"{long_name} by {' and '.join(reversed(dims))}")))
    shared: Any = {"title": title, "subtitle": subtitle, "theme": theme}
    if len(dims) == 1 and _is_text(ds, dims[0]) and f"{name}_low" in ds:
        return rows(ds, name, dims[0], x_title=value, **shared)
    if len(dims) == 1:
        return lines(ds, name, dims[0], None, y_title=value, **shared)
    if _has_lines(ds, dims):
        return lines(ds, name, dims[0], dims[1], y_title=value, **shared)
    return _heatmap(ds, name, value, **shared)


def _has_lines(ds: xr.Dataset, dims: list[str]) -> bool:
    """Return whether two axes are drawn as lines along the first one, and not as a heat map."""
    return ds.sizes[dims[1]] <= _MOST_LINES and dims[0] not in _NAMES


def _heatmap(ds: xr.Dataset, name: str, value: str, *, title: str, subtitle: str, theme: ThemeName) -> go.Figure:
    colours = THEMES[theme]
    row, column = map(str, ds[name].dims)
    values = ds[name].values.astype(float)
    grid = LayerHeatmap(np.arange(len(values)), np.arange(values.shape[1]), colours)
    labels = np.stack(np.meshgrid(*(ds[dim].values.astype(str) for dim in (row, column)), indexing="ij"), -1)
    grid.colour(values, labels, f"{row} %{{customdata[0]}}, {column} %{{customdata[1]}}: %{{z:.4g}}<extra></extra>")
    grid.missing(np.isnan(values))
    made = grid.finish(column, {"colorscale": colours.sequential, "colorbar": {"title": {"text": value}}})
    made.update_yaxes(title=row, **_ticks(ds, row))
    made.update_xaxes(**_ticks(ds, column))
    return apply_theme(made, colours, ds, title=title, subtitle=subtitle, height=grid.height)


def _ticks(ds: xr.Dataset, dim: str) -> dict[str, Any]:
    """Return the labels of an axis of a heat map, whose cells have the positions 0, 1, …; of many only some."""
    step = 1 if _is_text(ds, dim) else -(-ds.sizes[dim] // _MOST_TICKS)
    shown = range(0, ds.sizes[dim], step)
    return {"tickvals": list(shown), "ticktext": [str(ds[dim].values[i]) for i in shown]}


def _is_text(ds: xr.Dataset, dim: str) -> bool:
    return dim in ds.coords and ds[dim].dtype.kind in "OU"


def _cells(ds: xr.Dataset) -> Iterator[tuple[list[str], xr.Dataset, str]]:
    """Yield each variable of numbers with at most two axes; of further axes one label is chosen after the other."""
    ds = ds.assign_coords({d: np.arange(n) for d, n in ds.sizes.items() if d not in ds.coords})
    for name in map(str, ds.data_vars):
        interval = name.removesuffix("_low").removesuffix("_high")
        if not ds[name].dims or ds[name].dtype.kind not in "fiu" or (interval != name and interval in ds):
            continue
        if np.isnan(ds[name].values).all():  # such as p of prompts that are too few for a test
            continue
        own = ds[[n for n in (name, f"{name}_low", f"{name}_high") if n in ds]]
        further = list(map(str, ds[name].dims[:-2]))
        for chosen in product(*(ds[d].values for d in further)):
            cell = own.sel(dict(zip(further, chosen, strict=True))) if further else own
            yield [str(label) for label in chosen], cell.assign_attrs(ds.attrs), name


def _table(ds: xr.Dataset, name: str) -> Any:
    return ds.to_dataframe(dim_order=list(ds[name].dims)).reset_index()
