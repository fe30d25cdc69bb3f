"""Features of an autoencoder are shown by example, as a study and as pages that a graph's nodes point to.

Also tests `workbench.figures.feature_examples`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from tests.capture.test_feature_lists import HOOK, LAYER, write_sae
from tests.conftest import DATA
from tests.studies.test_feature_pages import Feature
from workbench import registry
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import from_run
from workbench.harmony.transcripts import write_transcripts
from workbench.model.transformer import GptOss
from workbench.runs.reader import Run
from workbench.studies import feature_examples, feature_pages


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def run(model: GptOss, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("features")
    sae = write_sae(folder / "sae", model.cfg.d_model)
    rows = from_run.transcripts(wb.open_run(DATA / "demo.zarr"))[:8]
    write_transcripts(folder / "rows.jsonl", rows)
    return wb.capture(model, folder / "rows.jsonl", folder / "run.zarr", record=["routing", f"features:{sae}"])


def test_shares_and_contexts_are_those_of_the_tokens(run: Run, model: GptOss) -> None:
    datasets = registry.find("feature-examples").load().study(run)
    table, ds = datasets["features"], datasets["examples"]
    assert ((table["share"] >= 0) & (table["share"] <= 1)).all()
    gap = abs(table["share"].sel(channel="analysis") - table["share"].sel(channel="final")).values
    assert gap[int(ds["feature"][0])] == pytest.approx(gap.max())
    ids = np.concatenate([block["id"] for block in run.blocks("id")])
    starts = np.concatenate([[0], run.sequences["length"].cumsum().to_numpy()])
    for kind in ("top", "random"):
        shown = np.argwhere(ds[f"{kind}_sequence"].values >= 0)
        assert len(shown) > 50
        for place in map(tuple, shown[:: len(shown) // 20]):
            at = starts[ds[f"{kind}_sequence"].values[place]] + ds[f"{kind}_position"].values[place]
            assert ds[f"{kind}_token"].values[place] == model.tokenizer.decode([int(ids[at])])
            assert ds[f"{kind}_activation"].values[place] > 0
    assert not np.array_equal(ds["top_position"], ds["random_position"]), "negative control: the lists differ"
    item = registry.find("feature-examples").load_figures().gallery(datasets)["share"]
    assert item.draw().data
    assert "features of blocks.2.hook_resid_post are active" in table.attrs["summary"]


def test_features_can_be_chosen(run: Run) -> None:
    study = registry.find("feature-examples").load().study
    assert study(run, features="7, 3")["examples"]["feature"].values.tolist() == [7, 3]
    for text, message in (("7,x", "is not a number"), ("99", "features 0 to 23")):
        with pytest.raises(InputError, match=message):
            study(run, features=text)
    with pytest.raises(InputError, match="name one of blocks"):
        study(run, hook="blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="recorded no examples of features"):
        feature_examples.load(wb.open_run(DATA / "demo.zarr"))


def test_the_command_writes_pages_of_features(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pages"
    done = CliRunner().invoke(app, ["export", str(run.path), "neuronpedia", "--out", str(out), "--features", "7,3"])
    assert done.exit_code == 0, done.output
    assert "2 features" in done.output
    for feature in (7, 3):
        number = feature_pages.dictionary_number(run.model, LAYER, feature)
        page = json.loads((out / f"{number}.json").read_text())
        Feature.model_validate(page)
        assert page["index"] == number
        assert page["label"] == f"feature {feature} of {HOOK}"
        assert max(page["examples_quantiles"][0]["examples"][0]["tokens_acts_list"]) > 0
    wrong = CliRunner().invoke(app, ["export", str(run.path), "neuronpedia", "--out", f"{out}2", "--features", "x"])
    assert "is not a number" in str(wrong.exception)
