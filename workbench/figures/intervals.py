"""Figures of numbers with intervals: lines by layer or position with bands, and rows of effects with bars."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.template import MARKERS, THEMES, ThemeName, apply_theme, band, translucent


def lines(
    ds: xr.Dataset,
    name: str,
    x: str,
    axis: str | None,
    *,
    title: str,
    subtitle: str,
    y_title: str,
    x_title: str = "",
    low: str = "",
    high: str = "",
    labels: Sequence[str] | None = None,
    log_x: bool = False,
    theme: ThemeName = "light",
) -> go.Figure:
    """Draw a variable along x, a line for each label of `axis`, with its 95 % band where there is one."""
    colours = THEMES[theme]
    figure = go.Figure()
    low, high = low or f"{name}_low", high or f"{name}_high"
    wheel = [colours.colour("channel", c) for c in ("analysis", "final", "commentary", "prompt", "other", "frame")]
    at = np.asarray(ds[x].values)
    place = np.arange(len(at)) if at.dtype.kind in "OU" else at
    for i, label in enumerate(labels if labels is not None else [None] if axis is None else list(ds[axis].values)):
        cell = ds if axis is None else ds.sel({axis: label})
        values = cell[name].values.astype(float)
        if not np.isfinite(values).any():
            continue
        text = y_title if label is None else str(label)
        named = colours.colour(str(axis), text)
        colour = named if named != colours.ink else wheel[i % len(wheel)]
        style = {"name": text, "legendgroup": text}
        if low in cell:
            figure.add_trace(
                band(
                    place,
                    cell[low].values,
                    cell[high].values,
                    fillcolor=translucent(colour, 0.2),
                    showlegend=False,
                    **style,
                )
            )
        symbol = MARKERS.get(text, ("circle", "square", "diamond", "cross", "x", "star")[i % 6])
        figure.add_trace(
            go.Scatter(
                x=place,
                y=values,
                mode="lines+markers",
                line={"color": colour, "width": 1.8},
                marker={"symbol": symbol, "size": 7},
                showlegend=axis is not None,
                hovertemplate=f"{x_title or x} %{{x}}: %{{y:.4g}}<extra>%{{fullData.name}}</extra>",
                **style,
            )
        )
    ticks = {"tickvals": list(place), "ticktext": [str(v) for v in at]} if at.dtype.kind in "OU" else {}
    figure.update_xaxes(title=x_title or x, **ticks)
    if log_x:
        figure.update_xaxes(type="log", range=[-0.1, float(np.log10(max(at[-1], 2))) + 0.1])
    figure.update_yaxes(title=y_title)
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=460)


def rows(
    ds: xr.Dataset,
    name: str,
    axis: str,
    *,
    title: str,
    subtitle: str,
    x_title: str,
    low: str = "",
    high: str = "",
    theme: ThemeName = "light",
) -> go.Figure:
    """Draw a row a label: point and 95 % bar, filled where the bar excludes zero, with a line at zero."""
    colours = THEMES[theme]
    values, lows, highs = (ds[n].values.astype(float) for n in (name, low or f"{name}_low", high or f"{name}_high"))
    shown = lows * highs > 0
    blue = colours.colour("channel", "analysis")
    labels = [str(v) for v in ds[axis].values]
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=labels,
            mode="markers",
            error_x={"array": highs - values, "arrayminus": values - lows, "color": blue, "thickness": 1.6, "width": 4},
            marker={"size": 9, "color": np.where(shown, blue, colours.paper), "line": {"color": blue, "width": 1.6}},
            customdata=np.stack([lows, highs], -1),
            hovertemplate="%{y}<br>%{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": colours.muted, "width": 1})
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(title=x_title)
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=200 + 30 * len(labels))
