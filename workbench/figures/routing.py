"""Figures of the routing study: load and its differences by layer and expert, entropy and divergence by layer.

Each takes a dataset of `workbench.studies.routing` and returns a plotly figure. Missing, zero and clipped cells never
look like a small or a large value; every interval that the study computed is drawn, or in the table where there is no
room.
"""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float
from plotly.subplots import make_subplots

from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.heatmap import LayerHeatmap, experts_of_layers, number_range, points_between
from workbench.figures.template import MARKERS, THEMES, Theme, ThemeName, apply_theme, band, translucent

# the colours of loads relative to uniform end here unless told otherwise
CLIP = 4.0


def load_heatmap(
    ds: xr.Dataset, channel: str, effort: str, *, clip: float = CLIP, theme: ThemeName = "light"
) -> go.Figure:
    """Return the load of each expert of each layer relative to uniform, in one channel and effort."""
    colours = THEMES[theme]
    cell = _select(ds, channel=channel, effort=effort)
    share = cell["share"].values
    n_experts = experts_of_layers(share)
    relative = share * n_experts[:, None]
    grid = LayerHeatmap(cell["layer"].values, cell["expert"].values, colours)
    intervals = [100 * cell[f"share{end}"].values for end in ("", "_low", "_high")]
    hover = (
        "layer %{y}, expert %{x}<br>%{customdata[0]:.2f} × uniform<br>"
        "%{customdata[1]:.2f} % of slots [%{customdata[2]:.2f}, %{customdata[3]:.2f}]<extra></extra>"
    )
    figure = grid.loads(share, np.stack([relative, *intervals], axis=-1), hover, clip)
    subtitle = (
        f"Share of routed slots over 1/{number_range(n_experts)}; {int(cell['tokens']):,} tokens of "
        f"{count_of(int(cell['prompts']), 'prompt')}; the table has 95 % intervals"
    )
    title = f"Expert load: {channel}, {effort} effort"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=grid.height)


def load_difference_heatmap(div: xr.Dataset, *, clip: float | None = None, theme: ThemeName = "light") -> go.Figure:
    """Draw load differences of two conditions, in points; pale, hatched cells are not shown to differ."""
    colours = THEMES[theme]
    a, b = div.attrs["a"], div.attrs["b"]
    points, different = 100 * div["difference"].values, div["expert_different"].values
    limit = _limit(points[different]) if clip is None else clip
    bounds = [100 * div[name].values for name in ("difference_low", "difference_high", "share_a", "share_b")]
    detail = np.stack([points, *bounds, div["difference_q"].values], axis=-1)
    hover = (
        "layer %{y}, expert %{x}<br>%{customdata[0]:+.2f} points [%{customdata[1]:+.2f}, %{customdata[2]:+.2f}], "
        f"q = %{{customdata[5]:.3g}}<br>{a} %{{customdata[3]:.2f}} %, {b} %{{customdata[4]:.2f}} %<extra></extra>"
    )
    grid = LayerHeatmap(div["layer"].values, div["expert"].values, colours)
    grid.differences(points, different, detail, hover, limit, "not shown to differ")
    grid.less(different & (points < 0))
    ticks = np.linspace(-limit, limit, 5)
    bar = {
        "title": {"text": points_between(a, b)},
        "tickvals": ticks,
        "ticktext": [f"{signed(tick, 3, 'g')}".replace("-", "−") if tick else "0" for tick in ticks],
    }
    figure = grid.finish_differences("expert", limit, bar)
    tested = int(np.isfinite(points).sum())
    subtitle = (
        f"{div.attrs['rests_on']}; difference of the share of routed slots; {different.sum()} of {tested} experts "
        "differ (q < 0.05, interval excludes 0)"
    )
    title = f"Difference in expert load: {_compared(div)}"
    return apply_theme(figure, colours, div, title=title, subtitle=subtitle, height=grid.height)


def entropy_by_layer(
    ds: xr.Dataset, *, panels: Literal["channel", "effort"] = "channel", theme: ThemeName = "light"
) -> go.Figure:
    """Draw the entropy of the load by layer, one panel for each channel and one line for each effort, with 95 % bands.

    Raises:
        InputError: `panels` is unknown, or no cell of the dataset has a token.
    """
    colours = THEMES[theme]
    if panels not in ("channel", "effort"):
        raise InputError(f"panels={panels!r} is unknown; choose channel or effort")
    lines = "effort" if panels == "channel" else "channel"
    present = [str(label) for label in ds[panels].values if ds["tokens"].sel({panels: label}).any()]
    if not present:
        raise InputError("no cell of this dataset has a token, so there is no entropy to draw: record more sequences")
    figure = make_subplots(cols=len(present), shared_yaxes=True, subplot_titles=present, horizontal_spacing=0.02)
    figure.update_annotations(font={"size": 13})
    in_legend: set[str] = set()
    n_experts = experts_of_layers(ds["share"].max(["channel", "effort"]).values)
    value = "entropy_corrected" if np.isfinite(ds["entropy_corrected"].values).any() else "entropy"
    for column, label in enumerate(present, start=1):
        for line in map(str, ds[lines].values):
            cell = ds.sel({panels: label, lines: line})
            if cell["tokens"]:
                style = {"name": line, "legendgroup": line, "showlegend": line not in in_legend}
                colour, symbol = colours.colour(lines, line), MARKERS.get(line, "circle")
                for trace in _line_with_band(cell, value, colour, symbol, style):
                    figure.add_trace(trace, row=1, col=column)
                in_legend.add(line)
        style = {"dash": "dot", "width": 1.5, "color": colours.muted}
        if n_experts.min() == n_experts.max():
            figure.add_hline(y=np.log(n_experts[0]), line=style, row=1, col=column)
        else:
            steps = {"x": ds["layer"].values, "y": np.log(n_experts), "line": {**style, "shape": "hvh"}}
            figure.add_trace(go.Scatter(**steps, mode="lines", showlegend=False, hoverinfo="skip"), row=1, col=column)
    figure.update_xaxes(title="layer", **_layer_axis(ds))
    figure.update_yaxes(title="entropy of expert load (nat)", col=1)
    figure.update_layout(legend={"title": {"text": lines}})
    shown = {
        "entropy_corrected": "Bias-corrected entropy with 95 % intervals, bootstrap over prompts",
        "entropy": "Plug-in entropy, biased downwards: too few prompts for a correction and intervals",
    }[value]
    subtitle = f"{shown}; dotted: all {number_range(n_experts)} experts equally used"
    title = "How evenly experts are used, by layer, channel and effort"
    return apply_theme(figure, colours, ds, title=title, subtitle=subtitle, height=430)


def divergence_by_layer(div: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the divergence of two conditions by layer against its null, and below it the excess with its interval."""
    colours = THEMES[theme]
    different = div["different"].values
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07)
    for trace in _null_band(div, colours):
        figure.add_trace(trace, row=1, col=1)
    for row, trace in enumerate(_observed_and_excess(div, colours), start=1):
        figure.add_trace(trace, row=row, col=1)
    blue = colours.colour("channel", "analysis")
    for name, fill in (("differs (q < 0.05, interval above 0)", blue), ("not shown to differ", colours.paper)):
        key = {"symbol": "circle", "size": 8, "color": fill, "line": {"color": blue, "width": 1.5}}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=key), row=2, col=1)
    figure.add_hline(y=0, line={"color": colours.muted, "width": 1}, row=2, col=1)
    top = float(np.nanmax([div["jsd"], div["null_high"]]))
    figure.update_yaxes(title="divergence (bit)", range=[-0.05 * top, 1.08 * top], row=1, col=1)
    figure.update_yaxes(title="excess over chance (bit)", row=2, col=1)
    figure.update_xaxes(**_layer_axis(div))
    figure.update_xaxes(title="layer", row=2, col=1)
    subtitle = (
        f"{div.attrs['rests_on']}; Jensen–Shannon divergence of expert load with its permutation null, and the excess "
        f"with 95 % intervals; {different.sum()} of {int(div['jsd'].count())} layers differ"
    )
    title = f"Divergence of routing by layer: {_compared(div)}"
    return apply_theme(figure, colours, div, title=title, subtitle=subtitle, height=580)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and its data, under the names of their files."""
    load = datasets["load"]
    items = {
        "entropy_by_layer": GalleryItem(partial(entropy_by_layer, load), numbers(load, "channel_effort_layer"), load)
    }
    for channel, effort in product(map(str, load["channel"].values), map(str, load["effort"].values)):
        cell = load.sel(channel=channel, effort=effort)
        if cell["tokens"]:
            draw = partial(load_heatmap, load, channel, effort)
            items[f"load_{channel}_{effort}"] = GalleryItem(draw, numbers(cell, "layer_expert"), load)
    for name, div in datasets.items():
        if "jsd" in div:
            items[f"divergence_{name}"] = GalleryItem(partial(divergence_by_layer, div), numbers(div, "layer"), div)
            cells = numbers(div, "layer_expert")
            items[f"difference_{name}"] = GalleryItem(partial(load_difference_heatmap, div), cells, div)
    for name, ds in datasets.items():
        if "nmi" in ds:
            items[name] = GalleryItem(partial(special_by_layer, ds), numbers(ds, "layer"), ds)
    return items


def lift_heatmap(ds: xr.Dataset, channel: str, layer: int, *, theme: ThemeName = "light") -> go.Figure:
    """Draw which experts of a layer are chosen together more often than by chance, in a channel."""
    colours = THEMES[theme]
    cell = ds.sel(channel=channel, layer=layer)
    lift = cell["lift"].values.copy()
    np.fill_diagonal(lift, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.clip(np.log2(lift), -2, 2)
    shown[~np.isfinite(shown)] = np.nan
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            coloraxis="coloraxis",
            customdata=np.stack([lift, cell["given"].values], -1),
            hovertemplate="experts %{y} and %{x}: lift %{customdata[0]:.2f}<br>P(%{x} | %{y}) = "
            "%{customdata[1]:.2f}<extra></extra>",
        )
    )
    bar = {"title": {"text": "lift"}, "tickvals": [-2, -1, 0, 1, 2], "ticktext": ["≤ ¼", "½", "1", "2", "≥ 4"]}
    figure.update_layout(coloraxis={"cmin": -2, "cmax": 2, "colorscale": colours.diverging, "colorbar": bar})
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="expert", autorange="reversed")
    title = f"Experts chosen together: {channel}, layer {layer}"
    return apply_theme(
        figure, colours, ds, title=title, subtitle="P(both) over P(one) P(other), tokens of the channel", height=640
    )


def transition_heatmap(ds: xr.Dataset, channel: str, layer: int, *, theme: ThemeName = "light") -> go.Figure:
    """Draw which experts of the next layer a layer's experts lead to, in a channel."""
    colours = THEMES[theme]
    values = 100 * ds["next_given"].sel(channel=channel, layer_pair=layer).values
    hover = f"layer {layer} expert %{{y}} → layer {layer + 1} expert %{{x}}: %{{z:.1f}} %<extra></extra>"
    figure = go.Figure(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover))
    bar = {"title": {"text": "% of slots"}}
    figure.update_layout(coloraxis={"cmin": 0, "colorscale": colours.sequential, "colorbar": bar})
    figure.update_xaxes(title=f"expert in layer {layer + 1}")
    figure.update_yaxes(title=f"expert in layer {layer}", autorange="reversed")
    bits = float(ds["information_corrected"].sel(channel=channel, layer_pair=layer))
    subtitle = f"Share of the next layer's slots, by this layer's expert; {bits:.3f} bits from one to the next"
    return apply_theme(
        figure, colours, ds, title=f"From layer {layer} to {layer + 1}: {channel}", subtitle=subtitle, height=640
    )


def special_by_layer(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the information on a label in expert choices by layer, beside that of shuffled labels."""
    colours = THEMES[theme]
    figure = go.Figure()
    for name, label, style in (
        ("label_information", "observed", {"color": colours.colour("channel", "analysis")}),
        ("label_information_null", "labels shuffled", {"color": colours.muted, "dash": "dash"}),
    ):
        figure.add_trace(
            go.Scatter(x=ds["layer"].values, y=ds[name].values, name=label, mode="lines+markers", line=style)
        )
    figure.update_xaxes(title="layer", **_layer_axis(ds))
    figure.update_yaxes(title="information (bit)", rangemode="tozero")
    subtitle = (
        f"Mutual information of a slot's expert and the label; {int((ds['q'] < 0.05).sum())} of "
        f"{ds.sizes['layer']} layers beyond chance"
    )
    return apply_theme(figure, colours, ds, title=ds.attrs["title"], subtitle=subtitle, height=430)


def _select(ds: xr.Dataset, **labels: str) -> xr.Dataset:
    """Return one cell; a label that the dataset lacks is refused with those it has."""
    for axis, label in labels.items():
        known = [str(value) for value in ds[axis].values]
        if label not in known:
            raise InputError(f"{axis} {label!r} is not in this dataset; it has {', '.join(known)}")
    return ds.sel(labels)


def _compared(div: xr.Dataset) -> str:
    """Return the two sides of a comparison, and what was held fixed."""
    kind = {"channel": "", "effort": " effort", "task": " (tasks)"}[div.attrs["between"]]
    fixed = f", {div.attrs['within']}" if div.attrs["within"] else ""
    return f"{div.attrs['a']} against {div.attrs['b']}{kind}{fixed}"


def _layer_axis(ds: xr.Dataset) -> dict[str, Any]:
    """Return ticks at whole layers, and room for the first and the last."""
    layers = ds["layer"].values
    return {"range": [layers[0] - 0.5, layers[-1] + 0.5], "dtick": max(1, len(layers) // 6)}


def _limit(points: Float[np.ndarray, "cell"]) -> float:
    """End of a symmetric scale: the largest difference shown, rounded up."""
    largest = float(np.abs(points).max(initial=0.1))
    unit = 10.0 ** np.floor(np.log10(largest))
    return next(float(step * unit) for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * unit >= largest)


def _line_with_band(cell: xr.Dataset, value: str, colour: str, symbol: str, style: dict[str, Any]) -> list[go.Scatter]:
    """Return entropy by layer over its interval. value: the variable that is the line."""
    layers, hidden = cell["layer"].values, style | {"showlegend": False}
    names = ("entropy_low", "entropy_high", "effective_experts", "entropy_normalised")
    return [
        band(
            layers,
            cell["entropy_low"].values,
            cell["entropy_high"].values,
            fillcolor=translucent(colour, 0.22),
            **hidden,
        ),
        go.Scatter(
            x=layers,
            y=cell[value].values,
            mode="lines+markers",
            line={"color": colour, "width": 1.6},
            marker={"symbol": symbol, "size": 5},
            customdata=np.stack([cell[name].values for name in names], axis=-1),
            hovertemplate="layer %{x}: %{y:.3f} nat [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>plug-in: "
            "%{customdata[2]:.1f} effective experts, %{customdata[3]:.0%} of the "
            "maximum<extra>%{fullData.name}</extra>",
            **style,
        ),
    ]


def _null_band(div: xr.Dataset, colours: Theme) -> list[go.Scatter]:
    """Return what the divergence is when labels mean nothing."""
    layers = div["layer"].values
    return [
        band(
            layers, div["null_low"].values, div["null_high"].values, fillcolor=colours.band, name="95 % of permutations"
        ),
        go.Scatter(
            x=layers,
            y=div["null_mean"].values,
            mode="lines",
            name="mean of permutations",
            line={"color": colours.muted, "dash": "dash", "width": 1.5},
            hovertemplate="layer %{x}: %{y:.4f} bit by chance<extra></extra>",
        ),
    ]


def _observed_and_excess(div: xr.Dataset, colours: Theme) -> tuple[go.Scatter, go.Scatter]:
    """Return the divergence of every layer, and what of it is not chance; filled where a difference is shown."""
    blue, excess = colours.colour("channel", "analysis"), div["excess"].values
    fill = np.where(div["different"].values, blue, colours.paper)
    names = ("excess", "excess_low", "excess_high", "p", "q")
    shared = {
        "x": div["layer"].values,
        "marker": {"size": 8, "color": fill, "line": {"color": blue, "width": 1.5}},
        "customdata": np.stack([div[name].values for name in names], axis=-1),
        "hovertemplate": "layer %{x}: %{y:.4f} bit<br>excess %{customdata[0]:.4f} [%{customdata[1]:.4f}, "
        "%{customdata[2]:.4f}]<br>p = %{customdata[3]:.3g}, q = %{customdata[4]:.3g}<extra></extra>",
        "showlegend": False,
    }
    bars = {
        "array": div["excess_high"].values - excess,
        "arrayminus": excess - div["excess_low"].values,
        "color": blue,
        "thickness": 1.5,
        "width": 3,
    }
    return (
        go.Scatter(y=div["jsd"].values, mode="lines+markers", line={"color": blue, "width": 1.6}, **shared),
        go.Scatter(y=excess, mode="markers", error_y=bars, **shared),
    )
