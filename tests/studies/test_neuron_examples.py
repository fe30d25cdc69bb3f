"""Examples of neurons are shown in their context, as a study and as pages with direct logit effects.

Also tests `workbench.figures.neuron_examples`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench as wb
from tests.conftest import DATA
from tests.studies.test_feature_pages import Feature
from workbench import registry
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import expert_logits, from_run
from workbench.harmony.transcripts import write_transcripts
from workbench.model.transformer import GptOss
from workbench.runs.reader import Run
from workbench.studies import feature_pages, neuron_examples


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", device="cpu")


@pytest.fixture(scope="module")
def run(model: GptOss, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("neurons")
    rows = from_run.transcripts(wb.open_run(DATA / "demo.zarr"))[:12]
    write_transcripts(folder / "rows.jsonl", rows)
    return wb.capture(model, folder / "rows.jsonl", folder / "run.zarr", record=["routing", "neurons:2"])


def test_contexts_are_those_of_the_tokens(run: Run, model: GptOss) -> None:
    ds = neuron_examples.load(run)
    assert ds.attrs["layer"] == 2
    ids = np.concatenate([block["id"] for block in run.blocks("id")])
    starts = np.concatenate([[0], run.sequences["length"].cumsum().to_numpy()])
    shown = np.argwhere(ds["sequence"].values >= 0)
    for place in map(tuple, shown[:: len(shown) // 20]):
        at = starts[ds["sequence"].values[place]] + ds["position"].values[place]
        assert ds["token"].values[place] == model.tokenizer.decode([int(ids[at])])
        assert ds["token"].values[place] != ds["before"].values[place][-1:] or len(set(ids)) < 3
    for place in map(tuple, np.argwhere(ds["random_sequence"].values >= 0)[::3]):
        at = starts[ds["random_sequence"].values[place]] + ds["random_position"].values[place]
        assert ds["random_token"].values[place] == model.tokenizer.decode([int(ids[at])])
    size = np.abs(ds["activation"].values.astype(float))
    assert (np.diff(size, axis=-1) <= 0).all()
    np.testing.assert_allclose(ds["largest"], size.max(-1))
    item = registry.find("neuron-examples").load_figures().gallery({"neurons": ds})["largest"]
    assert np.sort(item.table()["largest"])[-1] == pytest.approx(float(ds["largest"].max()), rel=1e-6)
    assert item.draw().data, "the figure of the largest activations"
    other = neuron_examples.load(run, layer=2, expert=(ds.attrs["expert"] + 1) % 16)
    assert not np.array_equal(other["largest"].values.max(0), ds["largest"].values.max(0)), "the negative control"
    assert "neuron" in ds.attrs["summary"]
    with pytest.raises(InputError, match="recorded no neurons"):
        neuron_examples.load(wb.open_run(DATA / "demo.zarr"))


def test_direct_effects_are_those_of_the_output_weights(model: GptOss) -> None:
    neurons = expert_logits.neuron_logits(model, 2, 5, n=3)
    weight = model.blocks[2].mlp.experts.W_out(5).float()[7] * model.ln_final.weight.float()
    logits = model.unembed.weight.float() @ weight
    logits = logits - logits.mean()
    own = neurons.sel(neuron=7)
    np.testing.assert_allclose(own["top_logit"], logits.topk(3).values.detach(), rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(own["bottom_logit"], -(-logits).topk(3).values.detach(), rtol=0.02, atol=1e-3)
    assert not np.allclose(neurons.sel(neuron=8)["top_logit"], own["top_logit"], rtol=0.02), "the negative control"
    with pytest.raises(InputError, match="experts 0 to 15"):
        expert_logits.neuron_logits(model, 2, 16)


def test_direct_effects_are_beside_the_examples(run: Run, model: GptOss) -> None:
    effects = expert_logits.neuron_logits(model, 2, 5, n=3)
    ds = neuron_examples.load(run, layer=2, expert=5, logits=effects)
    assert ds["top_text"].sel(neuron=7).values.tolist() == effects["top_text"].sel(neuron=7).values.tolist()
    np.testing.assert_array_equal(ds["bottom_logit"], effects["bottom_logit"])
    assert "top_text" not in neuron_examples.load(run, layer=2, expert=5)
    with pytest.raises(InputError, match="logits are of layer 2 expert 5"):
        neuron_examples.load(run, layer=2, expert=4, logits=effects)


def test_the_experiment_stores_the_effects_of_a_layer_s_neurons(model: GptOss, run: Run) -> None:
    rows = from_run.transcripts(run)[:2]
    datasets = expert_logits.experiment(model, rows, tokens=3, neuron_layer=2)
    own = datasets["neurons"].sel(expert=5, neuron=7)
    wanted = expert_logits.neuron_logits(model, 2, 5, n=3).sel(neuron=7)
    assert own["top_text"].values.tolist() == wanted["top_text"].values.tolist()
    other = expert_logits.experiment(model, rows, tokens=3, neuron_layer=1, neuron_expert=5)["neurons"]
    assert other["expert"].values.tolist() == [5]
    assert not np.allclose(other.sel(expert=5, neuron=7)["top_logit"], own["top_logit"]), "negative control: a layer"
    items = registry.find("expert-logits").load_figures().gallery(datasets)
    assert items["neurons"].draw().data
    assert "neurons" not in expert_logits.experiment(model, rows)
    for options, message in (({"neuron_layer": 4}, "layers 0 to 3"), ({"neuron_expert": 1}, "name its layer")):
        with pytest.raises(InputError, match=message):
            expert_logits.experiment(model, rows, **options)


def test_the_command_writes_pages_of_neurons(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pages"
    arguments = ["export", str(run.path), "neuronpedia", "--out", str(out), "--model", "nano", "--sequences", "2"]
    done = CliRunner().invoke(app, [*arguments, "--neurons", "2.5"])
    assert done.exit_code == 0, done.output
    assert "neurons" in done.output
    pages = [json.loads(path.read_text()) for path in out.glob("*.json")]
    neurons = [page for page in pages if "neuron" in page]
    assert neurons
    for page in neurons[::20]:
        Feature.model_validate(page)
        assert page["index"] == feature_pages.neuron_number(run.model, 2, 5, page["neuron"])
        assert page["top_logits"]
        assert {q["quantile_name"].split(",")[0] for q in page["examples_quantiles"]} == {
            "Largest activations",
            "Random sample",
        }
    assert len({page["index"] for page in pages}) == len(pages)
    wrong = CliRunner().invoke(app, [*arguments, "--neurons", "2", "--overwrite"])
    assert "a layer and the number of an expert" in str(wrong.exception)
