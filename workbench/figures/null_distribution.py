"""The effect of an intervention beside those of random controls, a row for each dose, group of experts or measure."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.template import THEMES, ThemeName, apply_theme

_CONTROLS = {"set": "random sets", "control": "random controls"}  # axes of random effects, and their name
_MEASURE = "measure"  # the axis of effects that have different units


def drawable(ds: xr.Dataset) -> bool:
    """Return whether a result has random effects along one axis of controls and at most one other axis."""
    if not {"random", "change"} <= set(ds):
        return False
    dims = set(map(str, ds["random"].dims))
    return len(dims & _CONTROLS.keys()) == 1 and len(dims) <= 2 and dims - _CONTROLS.keys() <= set(ds["change"].dims)


def null_figure(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Return the random effects as points beside the effect itself with its interval, if it has one.

    Effects of different measures are in standard deviations of the random ones. The first label of further axes of
    `change` is the effect itself.
    """
    colours = THEMES[theme]
    axis = next(str(dim) for dim in ds["random"].dims if dim in _CONTROLS)
    row = next((str(dim) for dim in ds["random"].dims if dim != axis), None)
    own = ds[[name for name in ("change", "low", "high") if name in ds]]
    own = own.isel({str(dim): 0 for dim in ds["change"].dims if dim != row})
    random = ds["random"].transpose(*([row] if row else []), axis).values.astype(float)
    random = random if row else random[None]
    labels = [str(value) for value in ds[row].values] if row else [str(own["change"].attrs.get("long_name", "effect"))]
    values = {name: np.atleast_1d(own[name].values).astype(float) for name in map(str, own.data_vars)}
    unit = str(ds.attrs.get("units", "nat"))
    if row == _MEASURE:
        random, values = _standardized(random, values)
        unit = f"standard deviations of {_CONTROLS[axis]}"
    figure = go.Figure()
    jitter = np.random.default_rng(0)
    for i, label in enumerate(labels):
        effects = random[i][np.isfinite(random[i])]
        figure.add_trace(
            go.Scatter(
                x=effects,
                y=i + jitter.uniform(-0.22, 0.22, len(effects)),
                mode="markers",
                name=_CONTROLS[axis],
                legendgroup="random",
                showlegend=i == 0,
                marker={"size": 6, "color": colours.muted, "opacity": 0.6},
                hovertemplate=f"{label}, {_CONTROLS[axis]}: %{{x:+.3f}}<extra></extra>",
            )
        )
    error = None
    if {"low", "high"} <= values.keys():
        error = {
            "type": "data",
            "array": values["high"] - values["change"],
            "arrayminus": values["change"] - values["low"],
            "thickness": 1.6,
        }
    figure.add_trace(
        go.Scatter(
            x=values["change"],
            y=list(range(len(labels))),
            mode="markers",
            name="effect itself" + (", 95 % interval" if error else ""),
            marker={"size": 11, "symbol": "diamond", "color": colours.colour("channel", "final")},
            error_x=error,
            hovertemplate="%{x:+.3f}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"dash": "dot", "color": colours.muted})
    numeric = row is not None and ds[row].dtype.kind in "iuf"
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        range=[len(labels) - 0.5, -0.5],
        title=row if numeric else None,
    )
    figure.update_xaxes(title=f"change ({unit})")
    subtitle = f"Grey: {_CONTROLS[axis]} of the same size; diamonds: the effect itself"
    title = f"{ds.attrs['title']}: null distribution"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=230 + 46 * len(labels))


def _standardized(random: np.ndarray, values: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return effects less the mean of random ones, over their standard deviation, row by row; NaN where it is zero."""
    centre, spread = np.nanmean(random, axis=1), np.nanstd(random, axis=1, ddof=1)
    spread = np.where(spread > 0, spread, np.nan)
    scaled = {name: (value - centre) / spread for name, value in values.items()}
    return (random - centre[:, None]) / spread[:, None], scaled
