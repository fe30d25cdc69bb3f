"""LoRA folders that PEFT writes for small random models, the logits of transformers with them, and changed copies."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from tests.model.conftest import SHAPES, random_model, to_hf
from workbench.kernels.mxfp4 import dequantise, quantise
from workbench.model.config import Config
from workbench.model.lora import load_adapter, unload_adapter
from workbench.model.transformer import GptOss

# transformers is removing its name for gradient checkpointing, which PEFT still uses. PEFT's check of patterns looks at
# modules only, although patterns of parameters take effect too.
PEFT_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SHAPE = "ratio 3, d_head 24"
X = torch.randint(SHAPES[SHAPE].d_vocab, (2, 45), generator=torch.Generator().manual_seed(5))
Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTER = "mlp.router.weight"
GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    **{name: ([name], []) for name in ATTENTION},
    "router": ([], [ROUTER]),
    "gate_up": ([], [GATE_UP]),
    "down": ([], [DOWN]),
    "experts": ([], [DOWN, GATE_UP]),
    "all": (ATTENTION, [ROUTER, GATE_UP, DOWN]),
}


def with_peft(hf: GptOssForCausalLM, modules: Sequence[str], parameters: Sequence[str], **options: Any) -> PeftModel:
    """Return transformers' model with PEFT's adapter, whose factors are large enough to change the logits."""
    config = LoraConfig(
        **dict(
            r=3,
            lora_alpha=7,
            target_modules=list(modules),
            target_parameters=list(parameters),
            init_lora_weights=False,
        )
        | options
    )
    peft = get_peft_model(hf, config)
    rng = torch.Generator().manual_seed(3)
    for name, p in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.1, generator=rng)
    return peft.eval()


def dense_and_packed(cfg: Config) -> tuple[GptOss, GptOss]:
    """Return two models with the same weights: with packed experts, and with dense ones."""
    dense, packed = random_model(cfg), GptOss(cfg, packed=True)
    state = dense.state_dict()
    for name in [name for name in state if name.endswith(("gate_up.weight", "down.weight"))]:
        stem, blocks, scales = name.removesuffix(".weight"), *quantise(state[name].mT.contiguous())
        state[name].copy_(dequantise(blocks, scales, torch.float32).mT)
        state |= {f"{stem}.blocks": blocks, f"{stem}.scales": scales}
    packed.load_state_dict({name: state[name] for name in packed.state_dict()})
    return packed.requires_grad_(False).eval(), dense.requires_grad_(False)


@torch.no_grad()
def save_adapter(
    folder: Path, model: GptOss, modules: Sequence[str], parameters: Sequence[str], **options: Any
) -> Tensor:
    """Write PEFT's folder of an adapter and return the logits of transformers with it."""
    peft = with_peft(to_hf(model), modules, parameters, **options)
    peft.save_pretrained(folder)
    return peft(X).logits


@torch.no_grad()
def error(model: GptOss, folder: Path, wanted: Tensor) -> float:
    """Return the largest difference from the wanted logits, relative to the largest of them."""
    load_adapter(model, folder)
    try:
        return float((model(X) - wanted).abs().max() / wanted.abs().max())
    finally:
        unload_adapter(model)


def expert_major(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    for name in [name for name in factors if "experts" in name and "lora_B" in name]:
        factors[name] = factors[name].unflatten(1, (3, -1)).mT.flatten(1)


def spoilt(folder: Path, copy: Path, spoil: Spoil) -> Path:
    """Return a copy of an adapter that `spoil` has changed."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config, factors = json.loads((copy / CONFIG).read_text()), load_file(copy / WEIGHTS)
    spoil(config, factors)
    (copy / CONFIG).write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in factors.items()}, copy / WEIGHTS)
    return copy


def near(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() / wanted.abs().max() <= 1e-5
