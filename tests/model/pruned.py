"""Checkpoints whose layers have different numbers of experts: nano, or a random model, without its last experts."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from workbench.model.checkpoint import BUNDLED, open_checkpoint
from workbench.model.config import Config
from workbench.model.export import save_checkpoint


def without_last_experts(
    cfg: Config, tensors: Mapping[str, Tensor], keep: Sequence[int]
) -> tuple[Config, dict[str, Tensor]]:
    """The config and tensors with the first `keep` experts of each layer; numbers of the others do not change."""
    pruned = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        of_experts = layer is not None and (".router." in name or ".experts." in name)
        pruned[name] = tensor[: keep[layer]].clone() if of_experts and layer is not None else tensor
    return replace(cfg, num_experts=max(keep), layer_experts=tuple(keep)), pruned


def pruned_nano(folder: Path, keep: Sequence[int]) -> Path:
    """Write nano with the first `keep` experts of each layer as a checkpoint folder."""
    nano = open_checkpoint(BUNDLED["nano"])
    cfg, tensors = without_last_experts(nano.cfg, nano.tensors, keep)

    def tokenizer(staging: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            shutil.copy(BUNDLED["nano"] / name, staging)

    return save_checkpoint(folder, cfg, tensors, extra=tokenizer)


def with_unreachable_experts(state: Mapping[str, Tensor], cfg: Config, keep: Sequence[int]) -> dict[str, Tensor]:
    """A state dict in which no token reaches the experts after the first `keep` of each layer: their bias is tiny."""
    out = {name: tensor.clone() for name, tensor in state.items()}
    for layer, n in enumerate(keep):
        out[f"blocks.{layer}.mlp.router.bias"][n:] = torch.finfo(torch.float32).min / 4
    return out
