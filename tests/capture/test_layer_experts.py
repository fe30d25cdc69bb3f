"""Layers with different numbers of experts are recorded, studied and drawn, with missing cells where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import workbench as wb
from tests.model.pruned import pruned_nano
from workbench.errors import InputError
from workbench.figures import quick_look as quick_look_figures
from workbench.figures import routing as routing_figures
from workbench.figures.heatmap import experts_of_layers
from workbench.model.transformer import GptOss
from workbench.runs import verify
from workbench.runs.reader import Run
from workbench.studies import quick_look, run_study
from workbench.studies.layer_experts import layer_experts

KEEP = (16, 9, 12, 5)
EXISTS = np.arange(16) < np.array(KEEP)[:, None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    folder = pruned_nano(tmp_path_factory.mktemp("pruned") / "model", KEEP)
    return wb.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def run(model: GptOss, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("run") / "run.zarr"
    return wb.capture(model, transcripts, path, record=["routing", "router_logits"])


@pytest.fixture(scope="module")
def datasets(run: Run) -> dict[str, xr.Dataset]:
    return run_study("routing", run, n_boot=50, n_permutations=200)


def test_the_run_holds_what_the_model_routed(model: GptOss, run: Run) -> None:
    assert not list(verify.verify(run.path))
    assert layer_experts(run, 4, 16).tolist() == list(KEEP)
    tokens = run.sequence(0).compute()
    ids = torch.from_numpy(tokens["id"].values.astype(np.int64))[None]
    _, cache = model.run_with_cache(
        ids, names_filter=lambda name: name.endswith(("router.hook_out", "hook_expert_indices"))
    )
    for layer, n in enumerate(KEEP):
        stored = tokens["router_logits"].sel(layer=layer).values
        np.testing.assert_allclose(stored[:, :n], cache["router", layer][0], rtol=2e-3, atol=2e-3)
        assert np.isnan(stored[:, n:]).all()
        assert (tokens["experts"].sel(layer=layer).values == cache["expert_indices", layer][0].numpy()).all()
    counts = run.summary("expert_count").sum(("sequence", "channel")).values
    assert (counts[~EXISTS] == 0).all()
    assert (counts.sum(1) == counts[0].sum()).all()


def test_load_and_its_measures_are_of_the_experts_that_a_layer_has(run: Run, datasets: dict[str, xr.Dataset]) -> None:
    load = datasets["load"]
    cell = load.sel(channel="analysis", effort="high")
    counts = run.summary("expert_count")
    own = counts.values[counts["effort"].values == "high"].sum(0)[list(counts["channel"].values).index("analysis")]
    for layer, n in enumerate(KEEP):
        share = own[layer, :n] / own[layer, :n].sum()
        at = cell.sel(layer=layer)
        np.testing.assert_allclose(at["share"].values[:n], share)
        assert np.isnan(at["share"].values[n:]).all()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert float(at["entropy_normalised"]) == pytest.approx(entropy / np.log(n))
        assert float(at["max_violation"]) == pytest.approx(share.max() * n - 1)
        assert float(at["never_selected"]) == (share == 0).sum()
    of_sixteen = float(cell.sel(layer=3)["entropy"]) / np.log(16)
    assert float(cell.sel(layer=3)["entropy_normalised"]) > of_sixteen + 0.1, "one number for all layers must not pass"
    assert "effective experts of 5 to 16 on average" in load.attrs["summary"]


def test_no_dataset_has_a_number_for_an_expert_that_does_not_exist(datasets: dict[str, xr.Dataset]) -> None:
    seen = 0
    for name, result in datasets.items():
        for variable in result.data_vars.values():
            if {"layer", "expert"} <= set(variable.dims) and variable.dtype.kind == "f":
                others = [dim for dim in variable.dims if dim not in ("layer", "expert")]
                values = variable.transpose("layer", "expert", *others).values
                assert np.isnan(values[~EXISTS]).all(), (name, variable.name)
                seen += bool(np.isfinite(values[EXISTS]).any())
    assert seen > 10
    together = datasets["together"]
    assert np.isnan(together["next_given"].sel(layer_pair=0).values[..., 9:]).all()  # the second layer has 9
    div = datasets["analysis_vs_final"]
    assert f"of {sum(KEEP)} experts (layer × expert)" in div.attrs["summary"]


def test_heat_maps_mark_missing_cells_and_use_each_layers_uniform_load(
    run: Run, datasets: dict[str, xr.Dataset]
) -> None:
    load = datasets["load"]
    share = load.sel(channel="analysis", effort="high")["share"].values
    assert experts_of_layers(share).tolist() == list(KEEP)
    figure = routing_figures.load_heatmap(load, "analysis", "high", clip=100.0)
    coloured = next(trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis)
    np.testing.assert_allclose(coloured.z[3][:5], np.where(share[3, :5] > 0, share[3, :5] * 5, np.nan))
    crosses = next(trace for trace in figure.data if trace.type == "scatter" and trace.marker.symbol == "x-thin")
    assert set(zip(crosses.y, crosses.x, strict=True)) == set(zip(*np.nonzero(~EXISTS), strict=True))
    assert "over 1/5 to 16;" in figure.layout.title.subtitle.text
    entropy = routing_figures.entropy_by_layer(load)
    assert any(
        np.allclose(trace.y, np.log(KEEP)) for trace in entropy.data if trace.y is not None and len(trace.y) == 4
    )
    glance = quick_look.routing(run)
    assert np.isnan(glance["load"].values[~EXISTS]).all()
    quick = quick_look_figures.heatmap(glance, "load")
    shown = next(trace for trace in quick.data if trace.type == "heatmap" and trace.coloraxis)
    assert np.nanmax(np.abs(shown.z[3][:5] - np.minimum(5 * glance["load"].values[3, :5], 4.0))) < 1e-9
    table = quick_look.by_channel_and_effort(run, "load", 3, 0)
    row = table.set_index("channel").loc["all", "all"]
    assert row == pytest.approx(5 * float(glance["load"].values[3, 0]))


def test_what_needs_one_number_of_experts_is_refused(model: GptOss, transcripts: Path, tmp_path: Path) -> None:
    for record in ("router_logits layers=0-3", "router_logits experts=0"):
        with pytest.raises(InputError, match=r"layers \[1, 2, 3\] have fewer than 16 experts"):
            wb.capture(model, transcripts, tmp_path / "no.zarr", record=[record])
    narrow = wb.capture(model, transcripts, tmp_path / "layer0.zarr", record=["router_logits layers=0"])
    assert np.isfinite(narrow.sequence(0)["router_logits"].sel(layer=0)).all()
