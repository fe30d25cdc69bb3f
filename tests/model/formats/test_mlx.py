"""Folders of MLX hold the same tensors as the published layout; affine matrices are dequantised as MLX does it.

The folders are made here from the published tensors. docs/howto/formats.md has the comparison with folders that
mlx-lm 0.32 wrote on Linux.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.model.conftest import BASE
from tests.model.formats.mlx_files import Change, as_mlx
from workbench.errors import InputError
from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_random
from workbench.model.formats.mlx import is_mlx

CFG = replace(BASE, d_vocab=72, n_ctx=131_072)


def mlx_folder(folder: Path, experts: str = "mxfp4", change: Change = lambda tensors: None, cfg: Config = CFG) -> Path:
    """A random model as MLX stores it."""
    save_random(folder, cfg, experts=experts)
    return as_mlx(folder, change)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_a_folder_of_mlx_holds_the_same_tensors(tmp_path: Path, experts: str) -> None:
    checkpoint = open_checkpoint(mlx_folder(tmp_path / "model", experts))
    assert (checkpoint.layout, checkpoint.experts, checkpoint.cfg) == ("mlx", experts, CFG)
    assert not checkpoint.tensors.other_precision()
    for name, tensor in RandomTensors(CFG, experts=experts).items():
        assert torch.equal(checkpoint.tensors[name], tensor), name


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_layers_with_different_numbers_of_experts_hold_the_same_tensors(tmp_path: Path, experts: str) -> None:
    pruned = replace(CFG, layer_experts=(8, 5, 6))
    folder = mlx_folder(tmp_path / "model", experts, cfg=pruned)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.layout, checkpoint.cfg) == ("mlx", pruned)
    for name, tensor in RandomTensors(pruned, experts=experts).items():
        assert torch.equal(checkpoint.tensors[name], tensor), name
    config = json.loads((folder / "config.json").read_text())
    del config["block_configs"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    with pytest.raises(InputError, match=r"has layers with \[8, 5, 6\] experts, and its config says 8"):
        open_checkpoint(folder)


def test_gate_and_up_exchanged_are_another_model(tmp_path: Path) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        gate, up = (f"model.layers.0.mlp.experts.{part}_proj.weight" for part in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    checkpoint = open_checkpoint(mlx_folder(tmp_path / "model", change=exchange))
    name = "blocks.0.mlp.experts.gate_up.blocks"
    assert not torch.equal(checkpoint.tensors[name], RandomTensors(CFG)[name])


def affine(tensors: dict[str, Tensor], name: str, bits: int, group: int) -> Tensor:
    """Quantise a matrix and return its values by definition: code · scale + bias, the first code in the lowest bits."""
    weight = tensors[f"{name}.weight"].float()
    groups = weight.unflatten(-1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).bfloat16()
    codes = ((groups - low[..., None]) / scales.float()[..., None]).round().clamp(0, 2**bits - 1)
    biases = low.bfloat16()
    per_word = 32 // bits
    words = sum(codes.flatten(-2).long()[:, i::per_word] << bits * i for i in range(per_word))
    tensors[f"{name}.weight"] = (words - 2**32 * (words >= 2**31)).to(torch.int32).view(torch.uint32)
    tensors[f"{name}.scales"], tensors[f"{name}.biases"] = scales, biases
    return (codes * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (2, 64)])
def test_affine_matrices_are_dequantised_and_named(tmp_path: Path, bits: int, group: int) -> None:
    expected: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        expected["embed.weight"] = affine(tensors, "model.embed_tokens", bits, group)
        expected["blocks.2.attn.k.weight"] = affine(tensors, "model.layers.2.self_attn.k_proj", bits, group)

    checkpoint = open_checkpoint(mlx_folder(tmp_path / "model", change=quantise))
    assert checkpoint.tensors.other_precision() == {f"MLX {bits}-bit": ["embed.weight", "blocks.2.attn.k.weight"]}
    for name, values in expected.items():
        torch.testing.assert_close(checkpoint.tensors[name], values, rtol=0, atol=0)


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


SCALES = "model.layers.1.mlp.experts.up_proj.scales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(SCALES), "up_proj"),
        (drop("model.layers.1.mlp.experts.down_proj.bias"), "down_proj.bias' is missing"),
        (put("model.layers.0.extra", torch.ones(1)), "'model.layers.0.extra' is not part of a gpt-oss of MLX"),
        (
            put(SCALES, torch.zeros(8, 96, 3, dtype=torch.uint8)),
            r"up_proj.scales' is U8 \[8, 96, 3\], the config requires \[8, 96, 2\]",
        ),
        (
            put("model.norm.weight", torch.zeros(64, dtype=torch.int32)),
            r"'model.norm.weight' is I32 \[64\], the config requires",
        ),
        (
            put("model.embed_tokens.weight", torch.zeros(72, 10, dtype=torch.int32).view(torch.uint32)),
            "embed_tokens.scales' is missing",
        ),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(mlx_folder(tmp_path / "model", change=change))
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_a_folder_of_mlx_is_loaded_as_a_model(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["nano"] / name, folder)
    save_random(tmp_path / "published", CFG)
    x = torch.arange(60)[None]
    assert torch.equal(wb.load(folder, device="cpu")(x), wb.load(tmp_path / "published", device="cpu")(x))
    assert not is_mlx({})
