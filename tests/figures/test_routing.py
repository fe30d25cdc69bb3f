"""What each figure of the routing study shows, and that missing, zero and clipped cells cannot be taken for values."""

import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest

from workbench.errors import InputError
from workbench.figures import routing
from workbench.figures.template import THEMES


def every_figure(datasets, theme="light"):
    load, div = datasets["load"], datasets["analysis_vs_final"]
    return {
        "load": routing.load_heatmap(load, "final", "low", theme=theme),
        "difference": routing.load_difference_heatmap(div, theme=theme),
        "entropy": routing.entropy_by_layer(load, theme=theme),
        "by effort": routing.entropy_by_layer(load, panels="effort", theme=theme),
        "divergence": routing.divergence_by_layer(div, theme=theme),
    }


def cells(trace):
    """Places (layer, expert) with a value in a heatmap, or with a sign in a scatter."""
    if isinstance(trace, go.Heatmap):
        layer, expert = np.nonzero(np.isfinite(np.asarray(trace.z, float)))
        return set(zip(np.asarray(trace.y)[layer].tolist(), np.asarray(trace.x)[expert].tolist(), strict=True))
    return set(zip(np.asarray(trace.y).tolist(), np.asarray(trace.x).tolist(), strict=True))


def places(where):
    return set(zip(*(axis.tolist() for axis in np.nonzero(np.asarray(where))), strict=True))


def coloured(figure):
    return [trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis]


def filled(figure, colour):
    return [t for t in figure.data if t.type == "heatmap" and t.colorscale and t.colorscale[0][1] == colour]


def signs(figure, symbol):
    return [t for t in figure.data if t.type == "scatter" and t.marker.symbol == symbol and t.x[0] is not None]


@pytest.mark.parametrize("theme", THEMES)
def test_every_figure_states_what_it_shows_with_units_and_origin(datasets, theme):
    for name, figure in every_figure(datasets, theme).items():
        assert figure.layout.title.text, name
        assert figure.layout.title.subtitle.text, name
        axes = [axis for axis in figure.layout if axis.startswith(("xaxis", "yaxis"))]
        titles = {figure.layout[axis].title.text for axis in axes} - {None}
        assert "layer" in titles, name
        assert name in ("load", "difference") or any("(nat)" in t or "(bit)" in t for t in titles), name
        assert any("run synthetic-4" in annotation.text for annotation in figure.layout.annotations), name
        for trace in figure.data:
            described = trace.hovertemplate or trace.hoverinfo == "skip" or trace.x[0] is None
            assert described, f"{name}: {trace.name}"
            if trace.hovertemplate:
                assert "<extra>" in trace.hovertemplate, name
                assert ":+" not in trace.hovertemplate, f"{name}: plotly gives a number that rounds to 0 a sign"


def test_figures_neither_change_nor_remember_anything(datasets):
    before = {name: ds.copy(deep=True) for name, ds in datasets.items()}
    once, twice = every_figure(datasets), every_figure(datasets)
    for name in once:
        assert once[name] == twice[name]
    for name, ds in datasets.items():
        assert ds.identical(before[name])


def test_load_cells_are_coloured_zero_or_missing_but_never_two_of_them(load):
    figure = routing.load_heatmap(load, "final", "low")
    share = load["share"].sel(channel="final", effort="low").values
    (value,), (zero,), (missing,) = (
        coloured(figure),
        filled(figure, THEMES["light"].zero),
        filled(figure, THEMES["light"].missing),
    )
    assert cells(value) == places(share > 0)
    assert cells(zero) == places(share == 0) != set()
    assert cells(missing) == cells(signs(figure, "x-thin")[0]) == places(np.isnan(share)) != set()
    assert {trace.name for trace in figure.data if trace.showlegend} >= {"never selected", "missing"}


def test_load_is_shown_relative_to_uniform_and_clipped_cells_are_marked(load):
    share = load["share"].sel(channel="final", effort="low").values
    figure = routing.load_heatmap(load, "final", "low", clip=2)
    (value,) = coloured(figure)
    shown = np.asarray(value.z, float)
    np.testing.assert_allclose(shown[np.isfinite(shown)], np.minimum(16 * share, 2)[share > 0])
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == 2
    assert cells(signs(figure, "triangle-up")[0]) == places(16 * share > 2) != set()
    # values clipped in colour are unclipped on hover
    assert np.nanmax(np.asarray(value.customdata, float)[..., 0]) == pytest.approx(16 * np.nanmax(share))
    assert not signs(routing.load_heatmap(load, "final", "low", clip=16), "triangle-up")


def test_differences_have_a_symmetric_scale_around_zero(div):
    axis = routing.load_difference_heatmap(div).layout.coloraxis
    assert axis.cmin == -axis.cmax
    shown = 100 * np.abs(div["difference"].values[div["expert_different"].values])
    assert shown.max() <= axis.cmax < 2 * shown.max()
    middle = axis.colorscale[len(axis.colorscale) // 2]
    assert middle[0] == 0.5


def test_cells_not_shown_to_differ_are_pale_and_hatched(div):
    strong, pale = coloured(figure := routing.load_difference_heatmap(div))
    different, known = div["expert_different"].values, np.isfinite(div["difference"].values)
    assert cells(strong) == places(different) != set()
    assert cells(pale) == places(~different & known)
    assert pale.opacity < 0.5 < strong.opacity
    assert cells(signs(figure, "line-ne")[0]) == cells(pale)


def test_differences_beyond_the_scale_are_marked_on_their_side(div):
    figure = routing.load_difference_heatmap(div, clip=1)
    points = 100 * div["difference"].values
    for symbol, beyond in (("triangle-up", points > 1), ("triangle-down", points < -1)):
        marked = set().union(*map(cells, signs(figure, symbol)))  # one colour on strong cells, another on pale ones
        assert marked == places(beyond) != set()


def test_a_comparison_without_a_difference_still_has_a_scale(datasets):
    figure = routing.load_difference_heatmap(datasets["low_vs_high_in_prompt"])
    assert figure.layout.coloraxis.cmax == pytest.approx(0.1)
    assert "0 of 48 experts differ" in figure.layout.title.subtitle.text
    assert "low against high effort, prompt" in figure.layout.title.text


def test_entropy_has_panels_by_channel_and_lines_by_effort_with_intervals(load):
    figure = routing.entropy_by_layer(load)
    panels = [annotation.text for annotation in figure.layout.annotations][:3]
    assert panels == ["prompt", "analysis", "final"]
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill]
    assert len(lines) == len(bands) == 9
    assert [line.name for line in lines if line.showlegend] == ["low", "medium", "high"]
    cell = load.sel(channel="final", effort="high")
    line = next(trace for trace in lines if trace.xaxis == "x3" and trace.name == "high")
    np.testing.assert_array_equal(line.y, cell["entropy_corrected"])
    np.testing.assert_array_equal(np.asarray(line.customdata)[:, 1], cell["entropy_high"])


def test_entropy_of_too_few_prompts_is_drawn_without_a_correction(load):
    few = load.assign({name: load[name] * np.nan for name in ("entropy_corrected", "entropy_low", "entropy_high")})
    figure = routing.entropy_by_layer(few)
    line = next(trace for trace in figure.data if trace.mode == "lines+markers" and trace.xaxis == "x3")
    np.testing.assert_array_equal(line.y, load["entropy"].sel(channel="final", effort=line.name))
    assert "Plug-in entropy, biased downwards" in figure.layout.title.subtitle.text


def test_panels_can_be_efforts(load):
    figure = routing.entropy_by_layer(load, panels="effort")
    assert [annotation.text for annotation in figure.layout.annotations][:3] == ["low", "medium", "high"]
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert legend == ["prompt", "analysis", "final"]


def test_divergence_is_drawn_with_its_null_and_its_interval(div):
    figure = routing.divergence_by_layer(div)
    observed = next(trace for trace in figure.data if trace.mode == "lines+markers")
    excess = next(trace for trace in figure.data if trace.error_y.array is not None)
    np.testing.assert_array_equal(observed.y, div["jsd"])
    np.testing.assert_allclose(excess.y + excess.error_y.array, div["excess_high"])
    np.testing.assert_allclose(excess.y - excess.error_y.arrayminus, div["excess_low"])
    assert (observed.yaxis, excess.yaxis) == ("y", "y2")
    paper = THEMES["light"].paper
    assert [colour != paper for colour in observed.marker.color] == div["different"].values.tolist()
    band = next(trace for trace in figure.data if trace.fill)
    assert max(y for y in band.y if y is not None) == pytest.approx(float(div["null_high"].max()))


def test_what_a_dataset_lacks_is_refused_by_name(load):
    with pytest.raises(InputError, match="channel 'thought' is not in this dataset; it has frame, prompt"):
        routing.load_heatmap(load, "thought", "low")
    with pytest.raises(InputError, match="effort 'max' is not in this dataset; it has low, medium, high"):
        routing.load_heatmap(load, "final", "max")
    with pytest.raises(InputError, match="choose channel or effort"):
        routing.entropy_by_layer(load, panels="task")
    with pytest.raises(InputError, match="no entropy to draw"):
        routing.entropy_by_layer(load.sel(channel=["commentary"]))


def test_the_gallery_has_every_cell_and_comparison_and_their_data(datasets):
    figures = routing.gallery(datasets)
    assert sum(name.startswith("load_") for name in figures) == 9
    assert sum(name.startswith(("divergence_", "difference_")) for name in figures) == 2 * sum(
        "jsd" in ds for ds in datasets.values()
    )
    assert len(figures["load_final_low"].table()) == 4 * 16
    jsd = figures["divergence_analysis_vs_final"].table().jsd
    np.testing.assert_array_equal(jsd, datasets["analysis_vs_final"].jsd)
    for theme, paper in (("light", "#ffffff"), ("dark", "#14171c")):
        for drawing in figures.values():
            assert drawing.draw(theme=theme).layout.template.layout.paper_bgcolor == paper
            assert len(drawing.table())


def test_figures_are_drawn_without_torch_or_a_store():
    code = "import sys; import workbench.figures.routing; print({'torch', 'zarr', 'panel'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
