"""Figures of experiments: what each intervention changed, with its interval; what each expert is needed for."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.heatmap import Grid
from workbench.figures.template import MARGIN_ABOVE, MARGIN_BELOW, THEMES, ThemeName, apply_theme


def ablation_heatmap(ds: xr.Dataset, group: str, *, clip: float | None = None, theme: ThemeName = "light") -> go.Figure:
    """What taking each expert away does to one group of sequences; hatched where the interval includes zero."""
    colours = THEMES[theme]
    cell = ds.sel(group=group)
    change, low, high = (cell[name].values for name in ("change", "low", "high"))
    sure = (low > 0) | (high < 0)
    limit = float(np.nanmax(np.abs(change)) or 1.0) if clip is None else clip
    detail = np.stack([change, low, high, 100 * cell["share"].values], axis=-1)
    hover = (
        "layer %{y}, expert %{x}<br>%{customdata[0]:+.2f} nats [%{customdata[1]:+.2f}, %{customdata[2]:+.2f}]<br>"
        "%{customdata[3]:.1f} % of slots<extra></extra>"
    )
    grid = Grid(cell["layer"].values, cell["expert"].values, colours)
    grid.colour(np.where(sure, np.clip(change, -limit, limit), np.nan), detail, hover)
    grid.colour(np.where(~sure, np.clip(change, -limit, limit), np.nan), detail, hover, opacity=0.35)
    grid.missing(np.isnan(change))
    grid.sign(~sure & ~np.isnan(change), "line-ne", colours.band, "pale, hatched: the interval includes zero")
    grid.sign(change < -limit, "triangle-down", colours.on_scale, f"clipped: below −{limit:g}")
    bar = {"title": {"text": "nats a sequence"}}
    figure = grid.finish("expert", {"cmin": -limit, "cmax": limit, "colorscale": colours.diverging, "colorbar": bar})
    subtitle = f"{ds.attrs['study']}; change of log-probability; {ds.attrs['rests_on']} in all; 95 % intervals on hover"
    title = f"What each expert is needed for: {group}"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=grid.height)


def effect_bars(ds: xr.Dataset, *, title: str, theme: ThemeName = "light") -> go.Figure:
    """The change that each intervention makes, with its 95 % interval; open where the interval includes zero."""
    colours = THEMES[theme]
    names = [str(name) for name in ds["intervention"].values]
    change, low, high = (ds[name].values for name in ("change", "low", "high"))
    sure = (low > 0) | (high < 0)
    figure = go.Figure(
        go.Scatter(
            x=change,
            y=names,
            mode="markers",
            marker={"size": 9, "color": colours.ink, "symbol": ["circle" if s else "circle-open" for s in sure]},
            error_x={"array": high - change, "arrayminus": change - low, "symmetric": False, "color": colours.muted},
            hovertemplate="%{y}: %{x:+.2f} nats<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"dash": "dot", "width": 1.5, "color": colours.muted})
    figure.update_xaxes(title="change of log-probability (nats a sequence)")
    figure.update_yaxes(autorange="reversed", type="category")
    subtitle = f"{ds.attrs['rests_on']}; 95 % intervals, bootstrap over prompts; open: the interval includes zero"
    height = max(220, 24 * len(names) + MARGIN_ABOVE + MARGIN_BELOW)
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=height)
