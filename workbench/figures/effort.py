"""Figures of the effort study: what effort costs and brings, and what differs at equal position."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import contrast
from workbench.figures.template import MARKERS, THEMES, ThemeName, dress
from workbench.studies.result import tables


def accuracy_by_tokens(ds: xr.Dataset, task: str = "all", *, theme: ThemeName = "light") -> go.Figure:
    """Accuracy against analysis tokens, a point an effort with both intervals; other tasks as thin lines behind."""
    colours = THEMES[theme]
    figure = go.Figure()
    for other in map(str, ds["task"].values) if task == "all" else ():
        cell = ds.sel(task=other)
        if other != "all":
            figure.add_trace(
                go.Scatter(
                    x=cell["analysis_tokens"].values, y=cell["accuracy"].values, mode="lines", line={"color": colours.band, "width": 1.2},
                    name=other, showlegend=False, hovertemplate=f"{other}: %{{x:.0f}} tokens, %{{y:.2f}}<extra></extra>",
                )
            )  # fmt: skip
    for effort in map(str, ds["effort"].values):
        c = {str(k): float(v) for k, v in ds.sel(task=task, effort=effort).data_vars.items()}
        colour = colours.colour("effort", effort)

        def bar(name: str, c: dict[str, float] = c, colour: str = colour) -> dict[str, object]:
            return {
                "array": [c[f"{name}_high"] - c[name]],
                "arrayminus": [c[name] - c[f"{name}_low"]],
                "color": colour,
                "thickness": 1.8,
            }

        figure.add_trace(
            go.Scatter(
                x=[c["analysis_tokens"]], y=[c["accuracy"]], mode="markers", name=effort, error_x=bar("analysis_tokens"),
                error_y=bar("accuracy"), marker={"color": colour, "size": 11, "symbol": MARKERS[effort]},
                hovertemplate=f"{effort}: %{{x:.1f}} tokens, accuracy %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    most = (
        float(ds["analysis_tokens_high"].max())
        if task == "all"
        else float(ds["analysis_tokens_high"].sel(task=task).max())
    )
    figure.update_xaxes(title="analysis tokens a sequence", range=[-0.03 * most, 1.03 * most])
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.05])
    subtitle = "Means with 95 % intervals, jackknife over prompts" + ("; grey: single tasks" if task == "all" else "")
    return dress(
        figure,
        colours,
        ds,
        title="What thinking costs and brings" if task == "all" else f"What thinking costs and brings: {task}",
        subtitle=subtitle,
        height=460,
    )


def gallery(datasets: Mapping[str, xr.Dataset]) -> tuple[dict[str, go.Figure], dict[str, pd.DataFrame]]:
    """Every figure of the study and the numbers behind each."""
    figures: dict[str, go.Figure] = {"accuracy_by_tokens": accuracy_by_tokens(datasets["cost"])}
    data: dict[str, pd.DataFrame] = {"accuracy_by_tokens": tables(datasets["cost"])["task_effort"]}
    for kind in ("routing", "sinks"):
        own = {n.removeprefix(f"{kind}_"): ds for n, ds in datasets.items() if n.startswith(f"{kind}_")}
        drawn, numbers = contrast.gallery(
            own,
            title=f"How far {kind} differ with effort" if kind == "sinks" else "How far routing differs with effort",
        )
        figures |= {f"{kind}_{n}": f for n, f in drawn.items()}
        data |= {f"{kind}_{n}": t for n, t in numbers.items()}
    return figures, data
