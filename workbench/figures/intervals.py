"""Figures of numbers with intervals: lines by layer or position with bands, and rows of effects with bars."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Bool

from workbench.figures.template import MARKERS, THEMES, ThemeName, apply_theme, band, translucent
from workbench.studies.statistics import ALPHA

_MOST_TICKS = 40  # whole numbers that are all named on an axis


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
        fixed = colours.colour(str(axis), text)
        colour = fixed if fixed != colours.ink else wheel[i % len(wheel)]
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
    ticks: dict[str, Any] = {"tickvals": list(place), "ticktext": [str(v) for v in at]} if at.dtype.kind in "OU" else {}
    if at.dtype.kind in "iu" and not log_x and np.ptp(at) <= _MOST_TICKS:
        ticks = {"dtick": 1}  # no half layers
    figure.update_xaxes(title=x_title or x, **ticks)
    if len(at) == 1 and not log_x:  # the band of one point does not fill the figure
        figure.update_xaxes(range=[float(place[0]) - 1, float(place[0]) + 1])
    if log_x:
        figure.update_xaxes(type="log", range=[-0.1, float(np.log10(max(at[-1], 2))) + 0.1])
    figure.update_yaxes(title=y_title)
    if axis is not None and np.asarray(ds[axis].values).dtype.kind in "iuf":  # numbers alone name nothing
        figure.update_layout(legend_title=axis)
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=460)


def shown_effects(
    ds: xr.Dataset, name: str = "change", low: str = "", high: str = ""
) -> tuple[Bool[np.ndarray, " *cells"], str]:
    """Return which effects are shown, as the summaries say it, and the rule in words for a caption.

    Effects that were tested together have `q` (`name_q`), at most 0.05 where an effect is shown; estimates without a
    test are marked by their intervals.
    """
    tested = next((ds[q] for q in (f"{name}_q", "q") if q in ds and ds[q].dims == ds[name].dims), None)
    if tested is not None:
        return np.asarray(tested.values <= ALPHA), f"q is at most {ALPHA}"
    lows, highs = ds[low or f"{name}_low"].values, ds[high or f"{name}_high"].values
    return np.asarray(lows * highs > 0), "the interval excludes zero"


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
    shown: Bool[np.ndarray, " row"] | None = None,
    theme: ThemeName = "light",
) -> go.Figure:
    """Draw one row for each label: point and 95 % bar, filled where an effect is shown, with a line at zero.

    shown: which points are filled, by default those of `shown_effects`.
    """
    colours = THEMES[theme]
    values, lows, highs = (ds[n].values.astype(float) for n in (name, low or f"{name}_low", high or f"{name}_high"))
    filled = shown_effects(ds, name, low, high)[0] if shown is None else shown
    blue = colours.colour("channel", "analysis")
    labels = [str(v) for v in ds[axis].values]
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=labels,
            mode="markers",
            error_x={"array": highs - values, "arrayminus": values - lows, "color": blue, "thickness": 1.6, "width": 4},
            marker={"size": 9, "color": np.where(filled, blue, colours.paper), "line": {"color": blue, "width": 1.6}},
            customdata=np.stack([lows, highs], -1),
            hovertemplate="%{y}<br>%{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": colours.muted, "width": 1})
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(title=x_title)
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=200 + 30 * len(labels))
