"""Figures of experiments: the effect of each intervention with its interval, and of the ablation of each expert."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.heatmap import LayerHeatmap
from workbench.figures.intervals import rows, shown_effects
from workbench.figures.template import THEMES, ThemeName, apply_theme


def ablation_heatmap(ds: xr.Dataset, group: str, *, clip: float | None = None, theme: ThemeName = "light") -> go.Figure:
    """Draw what taking each expert away does to one group of sequences; hatched where no effect is shown."""
    colours = THEMES[theme]
    cell = ds.sel(group=group)
    change, low, high = (cell[name].values for name in ("change", "low", "high"))
    sure, rule = shown_effects(cell, "change", "low", "high")
    limit = float(np.nanmax(np.abs(change)) or 1.0) if clip is None else clip
    detail = np.stack([change, low, high, 100 * cell["share"].values], axis=-1)
    hover = (
        "layer %{y}, expert %{x}<br>%{customdata[0]:+.2f} nats [%{customdata[1]:+.2f}, %{customdata[2]:+.2f}]<br>"
        "%{customdata[3]:.1f} % of slots<extra></extra>"
    )
    grid = LayerHeatmap(cell["layer"].values, cell["expert"].values, colours)
    grid.differences(change, sure, detail, hover, limit, f"not shown to differ from 0 (shown where {rule})")
    bar = {"title": {"text": "nats a sequence"}}
    figure = grid.finish_differences("expert", limit, bar)
    subtitle = f"{ds.attrs['study']}; change of log-probability; {ds.attrs['rests_on']} in all"
    title = f"Expert ablation: {group}"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=grid.height)


def effect_bars(ds: xr.Dataset, *, title: str, theme: ThemeName = "light") -> go.Figure:
    """Return the change that each intervention makes, with its 95 % interval; open where no effect is shown."""
    rule = shown_effects(ds, "change", "low", "high")[1]
    subtitle = f"{ds.attrs['rests_on']}; 95 % intervals over prompts; filled where {rule}"
    x_title = "change of log-probability (nats a sequence)"
    return rows(
        ds,
        "change",
        "intervention",
        title=title,
        subtitle=subtitle,
        x_title=x_title,
        low="low",
        high="high",
        theme=theme,
    )
