"""PEFT's LoRA folders act here as they do in transformers with PEFT, on weights that stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM

import workbench as wb
from tests.model.adapters import (
    PEFT_WARNINGS,
    SHAPE,
    TARGETS,
    Spoil,
    X,
    dense_and_packed,
    error,
    expert_major,
    near,
    save_adapter,
    spoilt,
    with_peft,
)
from tests.model.conftest import SHAPES, hf_config, to_hf
from workbench.errors import InputError
from workbench.model.cache import KVCache
from workbench.model.lora import load_adapter, unload_adapter
from workbench.model.transformer import GptOss

pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_each_target_is_what_transformers_with_peft_computes(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]], targets: str, kind: str
) -> None:
    model = adapted_models[kind == "dense"]
    folder, wanted = adapter_folders[targets]
    with torch.no_grad():
        assert (model(X) - wanted).abs().max() / wanted.abs().max() > 1e-2  # the adapter changes the logits
    assert error(model, folder, wanted) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 5, "experts.gate_up_proj": 2, r"layers\.[02]\..*down_proj": 1, "router.weight": 4}},
        {"alpha_pattern": {"q_proj": 1, "down_proj": 30, "mlp.router.weight": 2.5}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_scales_and_ranks_follow_the_config(
    adapted_models: tuple[GptOss, GptOss], options: dict[str, Any], tmp_path: Path
) -> None:
    wanted = save_adapter(tmp_path, adapted_models[1], *TARGETS["all"], **options)
    assert error(adapted_models[0], tmp_path, wanted) <= 1e-5


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {SHAPE}))
def test_other_shapes(shape: str, tmp_path: Path) -> None:
    packed, dense = dense_and_packed(SHAPES[shape])
    wanted = save_adapter(tmp_path, dense, *TARGETS["all"])
    assert error(packed, tmp_path, wanted) <= 1e-5
    assert error(dense, tmp_path, wanted) <= 1e-5


def flat_scale(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config["lora_alpha"] = config["r"]


def reversed_experts(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    for name in [name for name in factors if "experts" in name and "lora_A" in name]:
        factors[name] = factors[name].unflatten(0, (-1, 3)).flip(0).flatten(0, 1)


@pytest.mark.parametrize("spoil", [flat_scale, expert_major, reversed_experts])
def test_the_comparison_notices_a_broken_implementation(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]], spoil: Spoil, tmp_path: Path
) -> None:
    folder, wanted = adapter_folders["experts"]
    assert error(adapted_models[0], spoilt(folder, tmp_path, spoil), wanted) > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of models without a hub id
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_magnitudes_whole_modules_and_the_unembedding(
    adapted_models: tuple[GptOss, GptOss], options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted_models[0]
    with torch.no_grad():
        before = model(X)
        peft = with_peft(to_hf(adapted_models[1]), *TARGETS["q_proj"], **options)
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
        peft.save_pretrained(tmp_path)
        wanted = peft(X).logits
    assert (before - wanted).abs().max() / wanted.abs().max() > 1e-2  # the adapter changes the logits
    assert error(model, tmp_path, wanted) <= 1e-5
    with torch.no_grad():
        assert torch.equal(model(X), before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of models without a hub id
@torch.no_grad()
def test_directions_of_tokens_include_an_adapter_of_the_unembedding(
    adapted_models: tuple[GptOss, GptOss], tmp_path: Path
) -> None:
    model = adapted_models[0]
    with_peft(to_hf(adapted_models[1]), ["lm_head"], []).save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    try:
        stream = torch.ones(1, 1, model.cfg.d_model)
        near(
            model.tokens_to_residual_directions(torch.tensor([3, 5])) @ stream[0, 0] * stream[0, 0, 0],
            model.unembed(stream * model.ln_final.weight)[0, 0, [3, 5]],
        )
        assert not torch.equal(model.W_U, model.unembed.weight.mT)
    finally:
        unload_adapter(model)


@torch.no_grad()
def test_every_path_carries_the_adapter(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model, (folder, wanted) = adapted_models[0], adapter_folders["all"]
    load_adapter(model, folder)
    try:
        every = [(name, lambda t, hook: None) for name in model.hook_dict]
        near(model.run_with_hooks(X, fwd_hooks=every), wanted)
        near(model(X.flatten()[None], packed=[X.shape[1]] * len(X)).unflatten(1, X.shape).squeeze(0), wanted)
        cache = KVCache(model.cfg, len(X), X.shape[1], device=model.device, dtype=model.dtype)
        steps = [model(part, cache=cache) for part in X.split([30, 1, 1, X.shape[1] - 32], dim=1)]
        near(torch.cat(steps, 1), wanted)
    finally:
        unload_adapter(model)


@torch.no_grad()
def test_unloading_gives_the_base_back_bit_for_bit(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model = adapted_models[0]
    before, names = model(X), list(model.state_dict())
    load_adapter(model, adapter_folders["all"][0])
    with pytest.raises(InputError, match="already has the adapter"):
        load_adapter(model, adapter_folders["all"][0])
    unload_adapter(model)
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == names
    with pytest.raises(InputError, match="no adapter"):
        unload_adapter(model)


def test_gradients_reach_the_factors_through_packed_weights(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]]
) -> None:
    model = adapted_models[0]
    load_adapter(model, adapter_folders["all"][0])
    try:
        factors = {name: p.requires_grad_() for name, p in model.named_parameters() if ".lora." in name}
        model(X).logsumexp(-1).sum().backward()
        assert len(factors) == 14 * model.cfg.n_layers
        for name, p in factors.items():
            assert p.grad is not None, name
            assert p.grad.norm() > 0, name
    finally:
        unload_adapter(model)


@torch.no_grad()
def test_load_takes_an_adapter_and_the_digest_covers_it(tmp_path: Path) -> None:
    base = wb.load("nano", device="cpu", dtype=torch.float32)
    with_peft(GptOssForCausalLM(hf_config(base.cfg)), *TARGETS["all"]).save_pretrained(tmp_path)
    model = wb.load("nano", device="cpu", dtype=torch.float32, adapter=tmp_path)
    tokens = torch.arange(40)[None]
    assert not torch.allclose(model(tokens), base(tokens), atol=1e-2)
    assert model.checkpoint.digest != base.checkpoint.digest
    unload_adapter(model)
    assert model.checkpoint.digest == base.checkpoint.digest
    assert torch.equal(model(tokens), base(tokens))
