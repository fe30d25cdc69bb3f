"""Pages have the form that Neuronpedia's viewer reads, and their activations are the run's gate weights.

Also tests `workbench.cli.page_export`.
"""

import json
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from typer.testing import CliRunner

import workbench as wb
from tests.conftest import DATA
from workbench.cli import app
from workbench.experiments import graph_export
from workbench.studies import expert_examples, feature_pages


class Example(BaseModel):
    """AnthropicFeatureExample of Neuronpedia's webapp, at commit ebb8426, and what viewers need.

    Neuronpedia's and circuit-tracer's draw one activation for each token, and centre the example at `train_token_ind`.
    """

    model_config = ConfigDict(strict=True)

    is_repeated_datapoint: bool
    train_token_ind: int
    tokens: list[str]
    tokens_acts_list: list[float]

    @model_validator(mode="after")
    def check_tokens(self) -> Self:
        if not 0 <= self.train_token_ind < len(self.tokens) == len(self.tokens_acts_list):
            raise ValueError("tokens_acts_list or train_token_ind does not fit the tokens")
        return self


class Quantile(BaseModel):
    model_config = ConfigDict(strict=True)

    quantile_name: str
    examples: list[Example]


class Feature(BaseModel):
    """Also app/api/graph/feature-details-schema.json, which needs fewer of the fields."""

    model_config = ConfigDict(strict=True)

    index: int
    bottom_logits: list[str]
    top_logits: list[str]
    examples_quantiles: list[Quantile]


class CircuitTracerFeature(BaseModel):
    """As circuit-tracer 0.5.0's frontend/feature_models.py has it."""

    model_config = ConfigDict(strict=True)

    transcoder_id: str
    index: int
    examples_quantiles: list[Quantile]
    top_logits: list[str]
    bottom_logits: list[str]
    act_min: float
    act_max: float
    quantile_values: list[float]
    histogram: list[float]
    activation_frequency: float


def test_pages_are_those_of_the_runs_tokens(tmp_path: Path) -> None:
    run = wb.open_run(DATA / "demo.zarr")
    ds = expert_examples.load(run)
    n = feature_pages.write_pages(run, tmp_path / "pages", ds)
    files = sorted((tmp_path / "pages").glob("*.json"))
    assert len(files) == n == run.model["n_layers"] * run.model["num_experts"]
    starts = np.concatenate([[0], run.sequences["length"].cumsum().to_numpy()])
    data_of_run = {name: run.dataset[name].values for name in ("experts", "gates")}
    for file in files[::7]:
        data = json.loads(file.read_text())
        page = Feature.model_validate_json(file.read_text())
        assert file.stem == str(page.index)
        other = CircuitTracerFeature.model_validate_json(file.read_text())
        chosen = (data_of_run["experts"][data["layer"]] == data["expert"]).any(-1)
        assert other.activation_frequency == pytest.approx(chosen.mean(), abs=1e-5)
        assert 0 <= other.act_min < other.act_max <= 1
        assert page.index == feature_pages.expert_number(run.model, data["layer"], data["expert"])
        for quantile in data["examples_quantiles"]:
            for example in quantile["examples"][:3]:
                at = example["train_token_ind"]
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                first = starts[example["sequence"]] + example["position"] - at
                rows = slice(first, first + len(example["tokens"]))
                own = data_of_run["experts"][data["layer"], rows] == data["expert"]
                weights = (data_of_run["gates"][data["layer"], rows] * own).sum(-1)
                np.testing.assert_allclose(example["tokens_acts_list"], weights, atol=1e-4)
                assert example["tokens_acts_list"][at] > 0
        gates = [e.tokens_acts_list[e.train_token_ind] for e in page.examples_quantiles[0].examples]
        assert gates == sorted(gates, reverse=True)
    for damage in ({"tokens_acts_list": ["0.5"]}, {"tokens_acts_list": [0.5]}, {"train_token_ind": 99}):
        broken = json.loads(files[0].read_text())
        broken["examples_quantiles"][0]["examples"][0] |= damage
        with pytest.raises(ValueError, match="tokens_acts_list"):
            Feature.model_validate(broken)  # the negative control


def test_a_graph_finds_the_pages_of_its_experts(tmp_path: Path) -> None:
    out = tmp_path / "pages"
    arguments = [
        "export",
        str(DATA / "demo.zarr"),
        "neuronpedia",
        "--out",
        str(out),
        "--model",
        "nano",
        "--sequences",
        "6",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    attributed = wb.experiments.graph(model, "12+34=")
    data = graph_export.to_json(model, attributed, features_url="https://example.org/pages/", labels={(0, 0): "=x"})
    assert data["metadata"]["feature_details"] == {"feature_json_base_url": "https://example.org/pages"}
    assert data["metadata"]["schema_version"] is None, "Neuronpedia ignores the address in files of version 1"
    experts = [node for node in data["nodes"] if " expert " in node["clerp"] and "bias" not in node["clerp"]]
    assert experts
    for node in experts:
        page = Feature.model_validate_json((out / f"{node['feature']}.json").read_text())
        assert page.index == node["feature"]
        assert len(page.top_logits) == len(page.bottom_logits) == 10
    with pytest.raises(wb.InputError, match="begins with https"):
        graph_export.to_json(model, attributed, features_url="javascript:alert(1)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.parquet"], "give a format and --out"),
        (["neuronpedia", "--out", "p", "--format", "parquet"], "give a format and --out"),
        (["neuronpedia", "--out", "p", "--channel", "final"], "--channel is not an option of this format"),
        (["parquet", "--out", "p", "--model", "nano"], "--model is for the format neuronpedia"),
        (["nothing", "--out", "p"], "--format nothing: choose from"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(DATA / "demo.zarr"), *arguments])
    assert message in str(done.exception)
