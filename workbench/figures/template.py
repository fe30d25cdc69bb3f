"""How every figure looks: two themes with the same hues, and one layout for both.

Channels start from the hues of Paul Tol's *bright* scheme, efforts run in one order of hue and lightness; the tests
simulate colour deficiencies. Each has a marker of its own as well, so that a grey print can still be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Num

from workbench.figures.hover import write_signed_numbers
from workbench.notebook import notebook_display

ThemeName = Literal["light", "dark"]

FONT = "Inter, Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
WIDTH = 920
MARGIN_ABOVE = 92
# axis title, legend and origin, one above the other
MARGIN_BELOW = 104
LEGEND_HEIGHT = 26  # of its only line
MARKERS = {
    "low": "circle",
    "medium": "square",
    "high": "diamond",
    "frame": "x",
    "prompt": "triangle-up",
    "analysis": "circle",
    "commentary": "star",
    "final": "square",
    "other": "cross",
}


@dataclass(frozen=True)
class Theme:
    """Colours by what they mean."""

    paper: str
    ink: str
    muted: str
    grid: str
    band: str
    missing: str
    zero: str
    on_scale: str
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]
    channel: Mapping[str, str] = field(default_factory=dict)
    effort: Mapping[str, str] = field(default_factory=dict)

    def colour(self, axis: str, label: str) -> str:
        """Return the colour of a channel or an effort; ink for a label without one of its own."""
        return {"channel": self.channel, "effort": self.effort}.get(axis, {}).get(label, self.ink)


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2430",
    muted="#5b6472",
    grid="#e3e7ec",
    band="#c9ced6",
    missing="#d4d7dc",
    zero="#f2c879",
    on_scale="#ffffff",
    sequential=("#edf3f9", "#a9cbe4", "#5a9bcb", "#1f659f", "#08274f"),
    diverging=("#a3301b", "#e08a6a", "#f4f4f2", "#6fa6cf", "#14508c"),
    channel={
        "frame": "#888d94",
        "prompt": "#a4921a",
        "analysis": "#4477aa",
        "commentary": "#13682e",
        "final": "#d94f5c",
        "other": "#882255",
    },
    effort={"low": "#c98300", "medium": "#cc4778", "high": "#5b3cc4"},
)
DARK = Theme(
    paper="#14171c",
    ink="#e8eaee",
    muted="#9aa4b2",
    grid="#2a303a",
    band="#4a515d",
    missing="#3a3f48",
    zero="#8a6420",
    on_scale="#14171c",
    sequential=("#17212d", "#1f4a73", "#3a82b8", "#86bbdf", "#eaf4fc"),
    diverging=("#ff8f70", "#a84a32", "#24272d", "#2f6fa8", "#8cc4f2"),
    channel={
        "frame": "#c9ccd1",
        "prompt": "#e6d35a",
        "analysis": "#6fa3d8",
        "commentary": "#4db563",
        "final": "#f58a97",
        "other": "#d067a0",
    },
    effort={"low": "#f5b83d", "medium": "#ee7fa6", "high": "#a896f5"},
)
THEMES: dict[ThemeName, Theme] = {"light": LIGHT, "dark": DARK}


def template(theme: Theme) -> go.layout.Template:
    """Return the plotly template of a theme."""
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "zeroline": False,
        "tickcolor": theme.muted,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"font": {"size": 13}, "standoff": 8},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": theme.ink},
            "title": {
                "font": {"size": 17},
                "subtitle": {"font": {"size": 12.5, "color": theme.muted}},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "yref": "container",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 18},
            },
            "paper_bgcolor": theme.paper,
            "plot_bgcolor": theme.paper,
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 64, "r": 24, "t": MARGIN_ABOVE, "b": MARGIN_BELOW},
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
            "legend": {
                "bgcolor": "rgba(0,0,0,0)",
                "orientation": "h",
                "x": 0,
                "yref": "container",
                "yanchor": "bottom",
            },
            "coloraxis": {
                "colorbar": {
                    "thickness": 12,
                    "outlinewidth": 0,
                    "ticklen": 4,
                    "ticks": "outside",
                    "title": {"side": "right", "font": {"size": 13}},
                }
            },
            "annotationdefaults": {"font": {"color": theme.ink}},
        }
    )


def apply_theme(
    figure: go.Figure,
    theme: Theme,
    source: xr.Dataset | pd.DataFrame,
    *,
    title: str,
    subtitle: str = "",
    height: int = 480,
) -> go.Figure:
    """Give a figure its theme, title and size, at its foot where the numbers come from, and texts at the pointer.

    source: what is drawn. Its attribute `run_digest` or `checkpoint_digest` makes the foot, or else `source`, a text;
    data without these attributes has no foot.
    """
    write_signed_numbers(figure)
    figure.update_layout(
        template=template(theme),
        title={"text": title, "subtitle": {"text": subtitle}},
        width=None if notebook_display() else WIDTH,  # in a notebook as wide as the cell
        height=height,
        legend={"y": 24 / height},
    )
    if not (origin := _origin(source.attrs)):
        return figure
    figure.add_annotation(
        text=origin,
        font={"size": 10, "color": theme.muted},
        showarrow=False,
        xref="paper",
        yref="paper",
        x=1,
        y=0,
        xanchor="right",
        yanchor="bottom",
        yshift=6 - MARGIN_BELOW,
    )
    return figure


def _origin(attrs: Mapping[Any, Any]) -> str:
    """Return the source of the numbers in one line; "" if their attributes do not name it."""
    for name in ("run", "checkpoint"):
        if f"{name}_digest" in attrs:
            version = f" · workbench {attrs['workbench_version']}" if "workbench_version" in attrs else ""
            return f"{name} {str(attrs[f'{name}_digest'])[:16]}{version}"
    return str(attrs.get("source", ""))


def band(
    x: Num[np.ndarray, "point"], low: Float[np.ndarray, "point"], high: Float[np.ndarray, "point"], **style: Any
) -> go.Scatter:
    """Return the area between two curves, with a gap where either is missing; a lone point gets a little width."""
    around_x: list[float | None] = []
    around_y: list[float | None] = []
    known = np.isfinite(low) & np.isfinite(high)
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if known[part[0]]:
            across = x[part] if len(part) > 1 else x[part] + np.array([-0.15, 0.15])
            upper, lower = (np.broadcast_to(edge[part], across.shape) for edge in (high, low))
            around_x += [*across, *across[::-1], None]
            around_y += [*upper, *lower[::-1], None]
    return go.Scatter(x=around_x, y=around_y, fill="toself", mode="lines", line={"width": 0}, hoverinfo="skip", **style)


def translucent(colour: str, alpha: float) -> str:
    """Return a hex colour with transparency, for bands."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
