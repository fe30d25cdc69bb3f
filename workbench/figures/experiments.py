"""Figures of experiments: effects of interventions with their intervals."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Bool

from workbench.figures.gallery import Gallery, GalleryItem
from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.intervals import lines, rows, shown_effects
from workbench.figures.template import THEMES, ThemeName, apply_theme
from workbench.studies.result import tables
from workbench.studies.statistics import ALPHA


def figure(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Return rows of effects, lines by layer, or cells of layer and expert: whichever the dataset has."""
    title = ds.attrs["title"]
    dims = tuple(map(str, ds["change"].dims)) if "change" in ds.data_vars else ()
    if "same" in ds:
        return rows(
            ds,
            "same",
            "change",
            title=title,
            subtitle=ds.attrs.get("rests_on", ""),
            x_title="share of answers that stay the same",
            theme=theme,
        )
    unit = ds.attrs.get("units", ds.attrs.get("unit", "nat"))
    subtitle = f"{ds.attrs.get('rests_on', 'means over prompts')}; 95 % intervals"
    shared: Any = {"title": title, "subtitle": subtitle, "low": "low", "high": "high", "theme": theme}
    if len(dims) == 1:
        shared["subtitle"] += f", filled where {shown_effects(ds, 'change', 'low', 'high')[1]}"
        return rows(ds, "change", dims[0], x_title=_change(unit), **shared)
    if dims == ("group", "which"):
        flat = ds.drop_vars("q", errors="ignore").stack(row=("group", "which"))
        flat = flat.drop_vars(("row", "group", "which")).assign_coords(row=[f"{g}: {w}" for g, w in flat["row"].values])
        shared["subtitle"] += f", filled where the named experts differ from random sets (q of at most {ALPHA})"
        return rows(flat, "change", "row", x_title=_change(unit), shown=_named_differ(ds), **shared)
    if len(dims) == 2 and dims[0] == "which":
        return lines(ds, "change", dims[1], "which", y_title=_change(unit), **shared)
    return _cells(ds, str(dims[1]), unit, theme)


def _named_differ(ds: xr.Dataset) -> Bool[np.ndarray, " row"]:
    """Return the rows (group, which) of named experts whose rank among random sets is shown to be extreme."""
    differ = ds["q"].values <= ALPHA if "q" in ds else np.zeros(ds.sizes["group"], dtype=bool)
    return (differ[:, None] & (np.arange(ds.sizes["which"]) == 0)).ravel()


def _change(unit: str) -> str:
    """Return the title of the axis of an effect; a number without a unit has none."""
    return "change" if unit == "1" else f"change ({unit})"


def _cells(ds: xr.Dataset, kind: str, unit: str, theme: ThemeName) -> go.Figure:
    colours = THEMES[theme]
    values, (shown, rule) = ds["change"].values, shown_effects(ds, "change", "low", "high")
    limit = float(np.abs(values).max(initial=1e-6))
    grid = LayerHeatmap(
        ds["layer"].values if "layer" in ds.coords else np.arange(len(values)), np.arange(values.shape[1]), colours
    )
    detail = np.stack([values, ds["low"].values, ds["high"].values], -1)
    hover = (
        f"layer %{{y}}, {kind} %{{x}}: %{{customdata[0]:+.3f}} [%{{customdata[1]:+.3f}}, "
        f"%{{customdata[2]:+.3f}}]<extra></extra>"
    )
    grid.differences(values, shown, detail, hover, limit, f"not shown to differ from 0 (shown where {rule})")
    made = grid.finish_differences(kind, limit, {"title": {"text": _change(unit)}})
    return apply_theme(
        made,
        colours,
        ds,
        title=ds.attrs["title"],
        subtitle="Means over prompts",
        height=grid.height,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return a figure for each dataset of an experiment, and its data."""
    return {name: GalleryItem(partial(figure, ds), partial(_main_table, ds), ds) for name, ds in datasets.items()}


def _main_table(ds: xr.Dataset) -> pd.DataFrame:
    """Return the table of the effects, or the longest one of a dataset that names its effects otherwise."""
    candidates = list(tables(ds.drop_vars([v for v in ("each", "base") if v in ds])).values())
    effects = [table for table in candidates if ("same" if "same" in ds else "change") in table]
    return effects[0] if effects else max(candidates, key=len)
