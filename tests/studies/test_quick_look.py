"""A glance at sums states what the tokens say, and what the studies' pooled numbers are."""

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.figures import quick_look as draw
from workbench.harmony.labels import CHANNELS
from workbench.studies import quick_look, routing, sinks


@pytest.fixture(scope="module")
def run():
    return wb.open_run(DATA / "demo.zarr")


def test_options_are_those_with_tokens(run):
    known = quick_look.options(run)
    assert known["effort"] == ["all", "low", "medium", "high"]
    assert known["channel"][0] == "all"
    assert "other" not in known["channel"]
    assert len(known["task"]) == 11


def test_a_selection_is_counted_as_its_tokens_are(run):
    data = run.dataset[["experts", "gates", "sink", "sequence", "channel"]].compute()
    table = run.sequences
    for channel, effort, task in (("analysis", "high", "sum"), ("all", "all", "all"), ("final", "all", "product")):
        of = table.loc[data["sequence"].values]
        inside = np.ones(len(of), bool) if effort == "all" else (of["effort"] == effort).to_numpy()
        inside = inside & (True if task == "all" else (of["task"] == task).to_numpy())
        number = data["channel"].values
        inside &= number != CHANNELS.index("frame") if channel == "all" else number == CHANNELS.index(channel)
        result = quick_look.routing(run, channel, effort, task)
        assert result.attrs["tokens"] == inside.sum() > 0
        for layer in range(4):
            chosen = data["experts"].values[layer][inside].ravel()
            gates = data["gates"].values[layer][inside].ravel().astype(np.float64)
            np.testing.assert_allclose(result["load"][layer], np.bincount(chosen, minlength=16) / chosen.size)
            weights = np.bincount(chosen, gates, 16)
            np.testing.assert_allclose(result["gates"][layer], weights / weights.sum(), atol=2e-3)
        rested = quick_look.sinks(run, channel, effort, task)
        mass = data["sink"].values[:, inside].astype(np.float64)
        np.testing.assert_allclose(rested["mass"], mass.mean(1), atol=2e-3)
        np.testing.assert_allclose(rested["spread"], mass.std(1), atol=2e-3)


def test_it_agrees_with_the_studies_and_lift_is_over_the_whole(run):
    load, mass = routing.load(run, n_boot=10), sinks.mass(run)
    cell = {"channel": "final", "effort": "low"}
    np.testing.assert_allclose(quick_look.routing(run, **cell)["load"], load["share"].sel(cell))
    np.testing.assert_allclose(quick_look.sinks(run, **cell)["mass"], mass["mass"].sel(cell), rtol=1e-6)
    np.testing.assert_allclose(quick_look.routing(run)["lift"], 1)
    table = quick_look.by_channel_and_effort(run, "load", 2, 3).set_index("channel")
    assert table.loc["final", "low"] == pytest.approx(16 * float(load["share"].sel(cell, drop=True)[2, 3]))
    assert np.isnan(table.loc["analysis", "low"])  # nano does not think at low effort


def test_no_tokens_are_missing_not_zero_and_an_unknown_channel_is_refused(run):
    nothing = quick_look.routing(run, "analysis", "low")
    assert np.isnan(nothing["load"]).all()
    assert "missing" in {trace.name for trace in draw.heatmap(nothing, "load").data}
    with pytest.raises(InputError, match="it has frame"):
        quick_look.routing(run, "finale")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_measure_is_drawn(run, theme):
    for measure in ("load", "gates", "lift"):
        assert draw.heatmap(quick_look.routing(run, "final"), measure, theme=theme).data
    for measure in ("mass", "spread"):
        assert draw.heatmap(quick_look.sinks(run, "final"), measure, theme=theme).data
