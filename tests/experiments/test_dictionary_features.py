"""Folders of autoencoders are loaded by the hook points that they name, each of which is named once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments.dictionary_features import load_autoencoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An autoencoder of nano's stream, as SAELens saves it."""
    out = tmp_path / "sae"
    out.mkdir()
    cfg = {"architecture": "standard", "d_in": 128, "d_sae": 64, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "metadata": {"hook_name": "blocks.2.hook_resid_post"}}
    (out / "cfg.json").write_text(json.dumps(cfg))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(128, 64, generator=generator) / 11
    weights = {"W_enc": matrix, "W_dec": matrix.T.contiguous(), "b_enc": torch.zeros(64), "b_dec": torch.zeros(128)}
    save_file(weights, out / "sae_weights.safetensors")
    return out


def test_autoencoders_are_loaded_by_their_points(folder: Path) -> None:
    loaded = load_autoencoders([folder], torch.device("cpu"))
    assert list(loaded) == ["blocks.2.hook_resid_post"]
    with pytest.raises(InputError, match="second one"):
        load_autoencoders([folder, folder], torch.device("cpu"))
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": {}}))
    with pytest.raises(InputError, match="names no hook point"):
        load_autoencoders([folder], torch.device("cpu"))


def test_the_command_attaches_an_autoencoder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    arguments = ["graph", "nano", "--prompt", "24*29", "--effort", "low", "--sae", str(folder), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "16", "--at", "3", "--neurons", "2", "--choices"])
    assert done.exit_code == 0, done.output
    labels = [node["clerp"] for node in json.loads(out.read_text())["nodes"]]
    assert any("layer 2 feature" in label for label in labels)
    assert any("neuron" in label for label in labels)
