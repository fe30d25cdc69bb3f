"""The neurons page: its table has the largest activation of each neuron, and its lists the examples that are recorded.

Also tests `workbench.dashboards.example_lists`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import workbench as wb
from tests.conftest import DATA
from tests.dashboards.test_features_page import PROMPTS
from workbench.cli import app
from workbench.dashboards import neurons_page
from workbench.dashboards.example_lists import coloured_example, example
from workbench.dashboards.pages import absent_pages, made
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.experiments import expert_logits
from workbench.runs import Run
from workbench.studies import neuron_examples

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("neurons")
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(PROMPTS)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    return wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=["routing", "neurons:1-2"])


@pytest.fixture(scope="module")
def ds(run: Run) -> xr.Dataset:
    return neuron_examples.load(run)


def session_of(*paths: Path, **chosen: str) -> Session:
    return Session(RunRegistry(paths), Selection(chosen), lambda: None)


def test_the_table_has_the_largest_activation_of_each_neuron_in_content(ds: xr.Dataset) -> None:
    rows = neurons_page.table(ds)
    own = ds.sel(channel=[name for name in ds["channel"].values if name != "frame"])
    largest = np.abs(own["activation"].values.astype(float)).max((0, 2))
    assert rows["activation"].abs().is_monotonic_decreasing
    for neuron, activation, channel, text in rows.head(10).itertuples(index=False):
        cell = ds.sel(neuron=neuron, channel=channel).isel(neuron_example=0)
        assert abs(activation) == pytest.approx(largest[neuron], abs=0.006)
        assert activation == pytest.approx(float(cell["activation"]), abs=0.006)
        assert f"[{cell['token'].item()}]" in text
    with_frame = np.abs(ds["activation"].values.astype(float)).max((0, 2))
    assert not np.allclose(with_frame, largest), "negative control: the frame has larger ones"


def test_examples_of_a_channel_are_those_of_the_study(run: Run, ds: xr.Dataset) -> None:
    neuron = int(neurons_page.table(ds)["neuron"].iloc[0])
    for kind, axis in (("", "neuron_example"), ("random_", "random_example")):
        rows = neurons_page.example_rows(ds, neuron, kind, "analysis")
        assert 0 < len(rows) <= ds.sizes[axis]
        values = ds[f"{kind}activation"].sel(neuron=neuron, channel="analysis").values
        assert [row["activation"] for row in rows] == pytest.approx(values[: len(rows)].tolist())
        assert all(row["sequence"] >= 0 for row in rows)
    top, random = (neurons_page.example_rows(ds, neuron, kind, "analysis") for kind in ("", "random_"))
    assert abs(top[0]["activation"]) > abs(random[0]["activation"]), "negative control: the lists differ"
    text = neurons_page.lists(session_of(Path(run.path)), ds, neuron, "")
    assert "transcript?" in text
    assert "<h3>analysis</h3>" in text
    assert "<h3>frame</h3>" not in text


def test_texts_of_examples_are_only_text() -> None:
    session = session_of(DATA / "demo.zarr")
    row = {"sequence": 3, "position": 5, "start": 4, "before": EVIL, "token": EVIL, "after": EVIL}
    for text in (
        example(session, row, EVIL, strength=0.5),
        example(session, row, EVIL),
        coloured_example(session, row, [EVIL, EVIL], [0.0, 2.0], EVIL),
    ):
        assert "<script>" not in text
        assert "sequence=3" in text
        assert "pin=5" in text
    assert "--share:100%" in coloured_example(session, row, ["a"], [2.0], ""), "a strength has a largest value"
    colours = coloured_example(session, row, ["a", "<|end|>", "b"], [1.0, 2.0, 0.0], "")
    assert colours.count("wb-own") == 1, "one token is the example"
    assert colours.index("wb-own") < colours.rindex("&lt;|end|&gt;") < colours.index("b</span></a>")
    assert "<span>one↵two</span>" in example(session, row | {"before": "one\ntwo"}, ""), "an example is one line"
    assert "wb-special'>&lt;|end|&gt;</span>" in example(session, row | {"after": "<|end|>"}, "")


def test_direct_effects_are_those_that_are_stored_for_the_neuron(run: Run) -> None:
    session = session_of(Path(run.path))
    (missing,) = neurons_page.logit_effects(session, 2, 5, 7)
    assert "--option neuron_layer=2" in str(missing.object)
    out = Path(run.path).parent / "logits"
    arguments = ["study", "expert-logits", str(run.path), "--model", "nano", "--sequences", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--option", "neuron_layer=2"])
    assert done.exit_code == 0, done.output
    session = session_of(Path(run.path))
    (shown,) = neurons_page.logit_effects(session, 2, 5, 7)
    assert "--option" not in str(getattr(shown, "object", ""))
    stored = session.registry.stored(session.name).experiments["expert-logits"]["neurons"]
    wanted = expert_logits.neuron_logits(wb.load("nano", device="cpu"), 2, 5).sel(neuron=7)
    rows = neurons_page.effects_table(stored.sel(expert=5, neuron=7))
    assert rows["raises"].tolist() == [repr(str(text)) for text in wanted["top_text"].values]
    np.testing.assert_allclose(rows["by (logits)"], wanted["top_logit"], atol=0.01)
    other = neurons_page.effects_table(stored.sel(expert=5, neuron=8))
    assert rows["raises"].tolist() != other["raises"].tolist(), "negative control: another neuron"
    (other_layer,) = neurons_page.logit_effects(session, 1, 5, 7)
    assert "neuron_layer=1" in str(other_layer.object)
    session.registry.jobs.close()


def test_pages_without_a_record_are_grey_and_say_how_to_record_it(run: Run) -> None:
    without, with_neurons = session_of(DATA / "demo.zarr"), session_of(Path(run.path))
    assert {"neuron-examples", "features", "compare", "label-probes"} <= absent_pages(without)
    assert "neuron-examples" not in absent_pages(with_neurons), "negative control: a run that has neurons"
    assert not {"experts", "effort"} & absent_pages(without)
    without.registry.efforts = lambda *_: ["high"]  # type: ignore[method-assign]
    assert "effort" in absent_pages(without), "it compares efforts"
    page = made("neuron-examples", without)
    assert any("no recorded neurons" in str(part.object) for part in page.main)
    assert any("--record routing --record neurons" in str(part.object) for part in page.main)
    page = made("neuron-examples", with_neurons)
    assert [widget.label for widget in page.sidebar] == ["Layer", "Expert"]
    assert page.sidebar[0].options == ["1", "2"]
    for session in (without, with_neurons):
        session.registry.jobs.close()
