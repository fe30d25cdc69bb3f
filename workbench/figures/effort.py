"""Figures of the effort study: accuracy vs. reasoning length, and differences at equal position."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import contrast
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.template import MARKERS, THEMES, ThemeName, apply_theme

_CHANGES = 5  # points of accuracy: the lines of tasks that change more have their name, the others lie on each other


def accuracy_by_tokens(ds: xr.Dataset, task: str = "all", *, theme: ThemeName = "light") -> go.Figure:
    """Draw accuracy against analysis tokens, a point an effort with both intervals; other tasks as thin lines."""
    colours = THEMES[theme]
    figure = go.Figure()
    for other in map(str, ds["task"].values) if task == "all" else ():
        cell = ds.sel(task=other)
        if other != "all":
            accuracy = 100 * cell["accuracy"].values
            changes = np.nanmax(accuracy, initial=-np.inf) - np.nanmin(accuracy, initial=np.inf)
            figure.add_trace(
                go.Scatter(
                    x=cell["analysis_tokens"].values,
                    y=accuracy,
                    mode="lines+text" if changes >= _CHANGES else "lines",
                    text=[*[""] * (len(accuracy) - 1), other],
                    textposition="bottom center",
                    textfont={"color": colours.muted, "size": 11},
                    line={"color": colours.band, "width": 1.2},
                    name=other,
                    showlegend=False,
                    hovertemplate=f"{other}: %{{x:.0f}} tokens, %{{y:.0f}} %<extra></extra>",
                )
            )
    for effort in map(str, ds["effort"].values):
        c = {str(k): float(v) for k, v in ds.sel(task=task, effort=effort).data_vars.items()}
        colour = colours.colour("effort", effort)

        def bar(name: str, unit: float, c: dict[str, float] = c, colour: str = colour) -> dict[str, object]:
            return {
                "array": [unit * (c[f"{name}_high"] - c[name])],
                "arrayminus": [unit * (c[name] - c[f"{name}_low"])],
                "color": colour,
                "thickness": 1.8,
            }

        figure.add_trace(
            go.Scatter(
                x=[c["analysis_tokens"]],
                y=[100 * c["accuracy"]],
                mode="markers",
                name=effort,
                error_x=bar("analysis_tokens", 1),
                error_y=bar("accuracy", 100),
                marker={"color": colour, "size": 11, "symbol": MARKERS[effort]},
                hovertemplate=f"{effort}: %{{x:.1f}} tokens, accuracy %{{y:.1f}} %<extra></extra>",
            )
        )
    most = (
        float(ds["analysis_tokens_high"].max())
        if task == "all"
        else float(ds["analysis_tokens_high"].sel(task=task).max())
    )
    figure.update_xaxes(title="analysis tokens per sequence", range=[-0.03 * most, 1.03 * most])
    figure.update_yaxes(title="accuracy (%)", range=[-3, 105])
    subtitle = "Means, 95 % intervals over prompts" + ("; grey: tasks" if task == "all" else "")
    return apply_theme(
        figure,
        colours,
        ds,
        title="Accuracy vs. reasoning length" if task == "all" else f"Accuracy vs. reasoning length: {task}",
        subtitle=subtitle,
        height=460,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    cost = datasets["cost"]
    items = {"accuracy_by_tokens": GalleryItem(partial(accuracy_by_tokens, cost), numbers(cost, "task_effort"), cost)}
    differences = "differences between efforts"
    titles = {"routing": f"Size of routing {differences}", "sinks": f"Size of sink {differences}"}
    return items | contrast.galleries(datasets, titles)
