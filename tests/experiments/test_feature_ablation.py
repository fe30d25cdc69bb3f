"""A feature is ablated at recorded examples: the effects are those of a spliced autoencoder without the feature.

Also tests `workbench.cli.features`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import feature_ablation
from workbench.experiments.from_run import transcripts
from workbench.hooks.sae import SAE, load_sae, splice
from workbench.model.transformer import GptOss
from workbench.runs import Run, feature_examples
from workbench.studies.result import load

FEATURE = 9
pytestmark = pytest.mark.filterwarnings("ignore::workbench.studies.intervals.FewPromptsWarning")


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: GptOss) -> Path:
    """A run with lists of examples, and the folder of the autoencoder."""
    folder = tmp_path_factory.mktemp("ablated")
    texts = [
        [
            {"role": "user", "content": f"{a}+{b}"},
            {"role": "assistant", "channel": "analysis", "content": f"{a}+{b}={a + b};"},
            {"role": "assistant", "channel": "final", "content": str(a + b)},
        ]
        for a, b in ((2, 3), (4, 5), (6, 1), (12, 7), (3, 3), (8, 9))
    ]
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(texts)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sae(folder / "sae", model.cfg.d_model)
    record = ["routing", f"features:{folder / 'sae'}"]
    wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=record)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return wb.open_run(folder / "run.zarr")


@pytest.fixture(scope="module")
def effects(model: GptOss, folder: Path, run: Run) -> xr.Dataset:
    return feature_ablation.measure(model, load_sae(folder / "sae"), run, FEATURE, examples=3)


@torch.no_grad()
def without(model: GptOss, sae: SAE, ids: list[int], *features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities after the last id and the features there, with some of them set to zero everywhere."""
    seen = []

    def zero(acts: torch.Tensor, hook: object) -> torch.Tensor:
        seen.append(acts[0, -1].clone())
        acts = acts.clone()
        acts[..., list(features)] = 0
        return acts

    with splice(model, sae) as point, model.hooks(fwd_hooks=[(point, zero)]):
        logits = model(torch.tensor([ids]))[0, -1].double()
    return logits.log_softmax(-1), seen[0]


def test_effects_are_those_of_a_spliced_autoencoder(model: GptOss, folder: Path, run: Run, effects: xr.Dataset) -> None:
    sae, texts = load_sae(folder / "sae"), transcripts(run)
    changes = []
    for number in range(effects.sizes["example"]):
        one = effects.isel(example=number)
        ids, at = texts[int(one["sequence"])].tokens.tolist(), int(one["position"])
        plain, features = without(model, sae, ids[: at + 1])
        ablated, _ = without(model, sae, ids[: at + 1], FEATURE)
        assert float(one["activation"]) == pytest.approx(float(features[FEATURE]), rel=1e-4) != 0
        assert str(one["next_token"].values) == model.tokenizer.decode([ids[at + 1]])
        assert float(one["logprob"]) == pytest.approx(float(plain[ids[at + 1]]), abs=1e-4)
        assert float(one["change"]) == pytest.approx(float((ablated - plain)[ids[at + 1]]), abs=1e-3)
        assert float(one["kl"]) == pytest.approx(float((plain.exp() * (plain - ablated)).sum()), abs=1e-3)
        other, _ = without(model, sae, ids[: at + 1], FEATURE + 1)
        changes.append(float((other - plain)[ids[at + 1]]))
    assert not np.allclose(changes, effects["change"], atol=1e-3), "negative control: another feature"
    assert not np.allclose(effects["control_change"], effects["change"], atol=1e-3)


def test_logits_that_change_are_means_over_the_examples(
    model: GptOss, folder: Path, run: Run, effects: xr.Dataset
) -> None:
    sae, texts = load_sae(folder / "sae"), transcripts(run)
    own = effects.sel(example=effects["example_kind"] == "top")
    changes = []
    for sequence, at in zip(own["sequence"].values, own["position"].values, strict=True):
        ids = texts[int(sequence)].tokens.tolist()[: int(at) + 1]
        change = without(model, sae, ids, FEATURE)[0] - without(model, sae, ids)[0]
        changes.append(change - change.mean())
    mean = torch.stack(changes).mean(0)
    for side, largest in (("lowered", False), ("raised", True)):
        values, ids = mean.topk(feature_ablation.RANKS, largest=largest)
        np.testing.assert_allclose(effects[f"{side}_logit"].sel(kind="top"), values, atol=2e-3)
        assert effects[f"{side}_text"].sel(kind="top").values[0] == model.tokenizer.decode([int(ids[0])])
    assert float(effects["lowered_logit"].max()) < 0 < float(effects["raised_logit"].min())


def test_examples_are_the_recorded_ones_one_of_a_prompt(run: Run, effects: xr.Dataset) -> None:
    for _, own in effects.groupby("example_kind"):
        assert own.sizes["example"] <= 3
        assert len(set(own["sequence"].values.tolist())) == own.sizes["example"]
    assert "frame" not in effects["channel"].values
    largest = effects["activation"].sel(example=effects["example_kind"] == "top").values
    assert largest.tolist() == sorted(largest, reverse=True)
    assert set(run.sequences.index) >= set(effects["sequence"].values.tolist())


def test_what_cannot_be_measured_is_refused(
    model: GptOss, folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_sae(write_sae(tmp_path / "other", model.cfg.d_model, 23))
    with pytest.raises(InputError, match=r"no examples of this autoencoder's features \(recorded: examples of other"):
        feature_ablation.measure(model, other, run, FEATURE)
    sae = load_sae(folder / "sae")
    with pytest.raises(InputError, match="features 0 to 23"):
        feature_ablation.measure(model, sae, run, 24)
    lists = {name: np.full_like(values, -1) for name, values in feature_examples.of_run(run, "", [FEATURE]).items()}
    monkeypatch.setattr(feature_examples, "of_run", lambda *_: lists)
    with pytest.raises(InputError, match="active at no token"):
        feature_ablation.measure(model, sae, run, FEATURE)


def test_the_command_writes_what_is_measured(folder: Path, tmp_path: Path, effects: xr.Dataset) -> None:
    arguments = ["feature-ablation", str(folder / "run.zarr"), str(FEATURE), "--model", "nano"]
    arguments += ["--sae", str(folder / "sae"), "--examples", "3", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "without a random direction of the same size" in done.output
    (written,) = load(tmp_path / "out")["feature-ablation"].values()
    np.testing.assert_allclose(written["change"], effects["change"], atol=1e-4)
    assert written["token"].values.tolist() == effects["token"].values.tolist()
