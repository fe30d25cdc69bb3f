"""A grid of layers by experts (or heads) in which missing, zero and clipped cells look different from values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.figures.template import MARGIN_ABOVE, MARGIN_BELOW, WIDTH, Theme, translucent

# of a figure of standard width, less the axis and the colour bar
PLOT_WIDTH = WIDTH - 200
PLOT_HEIGHT = 420
# in pixels: neither slivers nor bars, and never so few that the colour bar cannot be read
CELL_HEIGHT = (11, 48)
LEAST_PLOT_HEIGHT = 190
SIGN_SIZE = 0.5
_BAR_CHARACTERS = 40  # of the title beside a colour bar of the least height


def experts_of_layers(load: Float[np.ndarray, "layer expert"]) -> Int[np.ndarray, " layer"]:
    """Return the number of experts of each layer: those whose load is a number; all of a layer without any."""
    n: np.ndarray = np.isfinite(load).sum(-1)
    return np.where(n > 0, n, load.shape[-1])


def points_between(a: str, b: str) -> str:
    """Return the title of a colour bar of differences a − b in percentage points, in two lines where it is long."""
    text = f"percentage points, {a} − {b}"
    return text if len(text) <= _BAR_CHARACTERS else f"points, {a}<br>− {b}"


def scale_limit(points: Float[np.ndarray, "layer column"], shown: Bool[np.ndarray, "layer column"]) -> float:
    """Return the end of a scale of differences: the largest that is shown, and at least nine tenths of all cells."""
    known = np.abs(points[np.isfinite(points)])
    return float(max(np.abs(points[shown]).max(initial=0.1), np.quantile(known, 0.9) if known.size else 0.0))


def number_range(numbers: Int[np.ndarray, " n"]) -> str:
    """Return the numbers as text: one, or the least and the most."""
    least, most = int(numbers.min()), int(numbers.max())
    return str(most) if least == most else f"{least} to {most}"


class LayerHeatmap:
    """A figure under construction: coloured cells first, then what lies on top of them."""

    def __init__(self, layers: np.ndarray, columns: np.ndarray, theme: Theme) -> None:
        """Prepare a heat map with these layers [layer] as rows and these columns [column]."""
        self.layers, self.columns, self.theme = layers, columns, theme
        tallest = max(CELL_HEIGHT[1], LEAST_PLOT_HEIGHT / len(layers))
        cell_height = float(np.clip(PLOT_HEIGHT / len(layers), CELL_HEIGHT[0], tallest))
        self.height = round(cell_height * len(layers)) + MARGIN_ABOVE + MARGIN_BELOW
        self.shorter_side = min(cell_height, PLOT_WIDTH / len(columns))
        self.figure = go.Figure()

    def colour(self, values: Float[np.ndarray, "layer column"], detail: np.ndarray, hover: str, **style: Any) -> None:
        """Draw the values [layer column] in the shared colour scale; NaN is left empty."""
        self._heatmap(values, coloraxis="coloraxis", customdata=detail, hovertemplate=hover, **style)

    def differences(
        self,
        values: Float[np.ndarray, "layer column"],
        shown: Bool[np.ndarray, "layer column"],
        detail: np.ndarray,
        hover: str,
        limit: float,
        unshown: str,
    ) -> None:
        """Draw signed values [layer column], those beyond ±limit marked; cells not `shown` are pale and hatched."""
        for cells, opacity in ((shown, 1.0), (~shown, 0.35)):
            self.colour(np.where(cells, np.clip(values, -limit, limit), np.nan), detail, hover, opacity=opacity)
        self.missing(np.isnan(values))
        hatch = translucent(self.theme.muted, 0.6)
        self.sign(~shown & ~np.isnan(values), "line-ne", hatch, f"pale, hatched: {unshown}")
        for beyond, symbol, name in (
            (values > limit, "triangle-up", f"clipped: above +{limit:.3g}"),
            (values < -limit, "triangle-down", f"clipped: below −{limit:.3g}"),
        ):
            self.sign(beyond & ~shown, symbol, self.theme.muted, name)
            self.sign(beyond & shown, symbol, self.theme.on_scale, "" if (beyond & ~shown).any() else name)

    def loads(self, load: Float[np.ndarray, "layer column"], detail: np.ndarray, hover: str, clip: float) -> go.Figure:
        """Return a figure of loads relative to uniform [layer column]; unused experts and clipped cells are marked.

        Uniform is one over the number of experts of the layer; NaN is an expert that the layer does not have.
        """
        experts = experts_of_layers(load)
        relative = load * experts[:, None]
        self.colour(np.where(load > 0, np.minimum(relative, clip), np.nan), detail, hover)
        self.fill(load == 0, self.theme.zero, "never selected")
        self.missing(np.isnan(load))
        self.sign(relative > clip, "triangle-up", self.theme.on_scale, f"clipped: more than {clip:g} × uniform")
        bar = {"title": {"text": "load (× uniform)"}}
        return self.finish("expert", {"cmin": 0, "cmax": clip, "colorscale": self.theme.sequential, "colorbar": bar})

    def less(self, where: Bool[np.ndarray, "layer column"]) -> None:
        """Mark cells with a negative difference, which grey prints cannot tell from a positive one."""
        self.sign(where, "line-ew", self.theme.on_scale, "dash: negative difference")

    def finish_differences(self, column_name: str, limit: float, bar: Mapping[str, Any]) -> go.Figure:
        """Return the figure with the diverging scale from −limit to limit."""
        scale = {"cmin": -limit, "cmax": limit, "colorscale": self.theme.diverging, "colorbar": dict(bar)}
        return self.finish(column_name, scale)

    def fill(self, where: Bool[np.ndarray, "layer column"], colour: str, name: str) -> None:
        """Cells of one colour that is not on the scale, named in the legend."""
        if where.any():
            scale = [[0, colour], [1, colour]]
            hover = f"layer %{{y}}, %{{x}}: {name}<extra></extra>"
            self._heatmap(np.where(where, 1.0, np.nan), colorscale=scale, showscale=False, hovertemplate=hover)
            self._key({"symbol": "square", "size": 11, "color": colour}, name)

    def missing(self, where: Bool[np.ndarray, "layer column"]) -> None:
        """Crossed-out cells where nothing was measured."""
        self.fill(where, self.theme.missing, "missing")
        self.sign(where, "x-thin", self.theme.muted)

    def sign(self, where: Bool[np.ndarray, "layer column"], symbol: str, colour: str, name: str = "") -> None:
        """A small sign in each of these cells, named in the legend."""
        if not where.any():
            return
        layer, column = np.nonzero(where)
        line_width = 1 if symbol in ("line-ne", "line-ew", "x-thin") else 0

        def marker(size: float, colour: str) -> dict[str, Any]:
            return {"symbol": symbol, "size": size, "color": colour, "line": {"color": colour, "width": line_width}}

        self.figure.add_trace(
            go.Scatter(
                x=self.columns[column],
                y=self.layers[layer],
                mode="markers",
                marker=marker((0.6 if "triangle" in symbol else 1.0) * SIGN_SIZE * self.shorter_side, colour),
                hoverinfo="skip",
                showlegend=False,
            )
        )
        if name:
            self._key(marker(9, self.theme.muted), name)

    def frame(self, layer: int, column: int) -> None:
        """Draw a frame of two colours around one cell, so that it is seen on pale and on dark cells."""
        corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        for colour, width in ((self.theme.paper, 6), (self.theme.ink, 3)):
            self.figure.add_shape(type="rect", line={"color": colour, "width": width}, **corners)

    def finish(self, column_name: str, scale: Mapping[str, Any]) -> go.Figure:
        """Draw the figure, with its axes and its colour scale."""
        every = max(1, len(self.columns) // 16)
        columns = [self.columns[0] - 0.5, self.columns[-1] + 0.5]
        self.figure.update_xaxes(title=column_name, showgrid=False, dtick=every, range=columns)
        every = max(1, len(self.layers) // 12)
        layers = [self.layers[-1] + 0.5, self.layers[0] - 0.5]
        self.figure.update_yaxes(title="layer", showgrid=False, dtick=every, range=layers)
        self.figure.update_layout(coloraxis=dict(scale))
        return self.figure

    def _heatmap(self, values: np.ndarray, **style: Any) -> None:
        gap = 1 if self.shorter_side > 8 else 0
        self.figure.add_trace(
            go.Heatmap(z=values, x=self.columns, y=self.layers, xgap=gap, ygap=gap, hoverongaps=False, **style)
        )

    def _key(self, marker: dict[str, Any], name: str) -> None:
        # plotly leaves out the legend of a single entry unless it is asked for
        entry = go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, showlegend=True)
        self.figure.add_trace(entry)


def difference_of_labels(
    cell: xr.Dataset, column: str, levels: tuple[str, str], sides: str, bar: str, theme: Theme
) -> tuple[go.Figure, int]:
    """Draw the difference between two token selections by layer and column, in percentage points; return its height.

    cell: one control of a study, with difference, low, high, q, different and the two variables of `levels`. Hatched
    cells are not shown to differ. sides: text for the levels, which are `%{customdata[3]}` and `%{customdata[4]}`. bar:
    title of the colour bar.
    """
    points, different = 100 * cell["difference"].values, cell["different"].values
    limit = scale_limit(points, different)
    percent = [100 * cell[name].values for name in ("difference", "low", "high", *levels)]
    hover = (
        f"layer %{{y}}, {column} %{{x}}<br>%{{customdata[0]:+.2f}} points [%{{customdata[1]:+.2f}}, "
        f"%{{customdata[2]:+.2f}}], q = %{{customdata[5]:.3g}}<br>{sides}<extra></extra>"
    )
    grid = LayerHeatmap(cell["layer"].values, cell[column].values, theme)
    grid.differences(points, different, np.stack([*percent, cell["q"].values], -1), hover, limit, "not shown to differ")
    grid.less(different & (points < 0))
    return grid.finish_differences(column, limit, {"title": {"text": bar}}), grid.height
