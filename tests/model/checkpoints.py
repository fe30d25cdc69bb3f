"""Random checkpoints of small models, as files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.model.conftest import BASE
from workbench.model.config import Config
from workbench.model.export import RandomTensors, save_checkpoint

CFG = replace(BASE, d_vocab=104, n_ctx=131_072)
ODD = replace(CFG, n_heads=6, n_key_value_heads=2, d_head=24, num_experts=5, experts_per_token=3)


def write(folder: Path, cfg: Config = CFG, **options: Any) -> Path:
    experts = options.pop("experts", "mxfp4")
    return save_checkpoint(folder, cfg, RandomTensors(cfg, experts=experts), **options)
