"""Folders as MLX writes them, made from folders in the Hugging Face layout."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[dict[str, Tensor]], object]


def as_mlx(folder: Path, change: Change = lambda tensors: None) -> Path:
    """Store the model of a folder as MLX does: gate and up apart, packed experts as words."""
    path = folder / "model.safetensors"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        stem, of_experts, rest = name.partition(".mlp.experts.")
        if not of_experts:
            stored[name] = tensor
            continue
        part, _, kind = rest.replace("_proj", "|").partition("|")
        for own, rows in (
            [("gate", slice(0, None, 2)), ("up", slice(1, None, 2))] if part == "gate_up" else [("down", slice(None))]
        ):
            module = f"{stem}.mlp.experts.{own}_proj"
            if kind == "_blocks":
                words = tensor[:, rows].flatten(2).contiguous().view(torch.uint32)
                stored[f"{module}.weight"] = words
            elif kind in ("_scales", "_bias"):
                stored[module + kind.replace("_", ".")] = tensor[:, rows].contiguous()
            else:
                stored[f"{module}.weight"] = tensor.mT[:, rows].contiguous()
    change(stored)
    save_file(stored, path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
