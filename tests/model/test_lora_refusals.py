"""An adapter that cannot be applied exactly is refused in one line that names the fault, and nothing is attached."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.adapters import CONFIG, GATE_UP, PEFT_WARNINGS, SHAPE, WEIGHTS, Spoil, spoilt, with_peft
from tests.model.conftest import SHAPES, random_model, to_hf
from workbench.errors import InputError
from workbench.model.lora import load_adapter
from workbench.model.transformer import GptOss

pytestmark = PEFT_WARNINGS
PREFIX = "base_model.model.model.layers.0."


def option(name: str, value: Any) -> Spoil:
    return lambda config, factors: config.update({name: value})


def rename(old: str, new: str) -> Spoil:
    def spoil(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
        for name in [name for name in factors if old in name]:
            factors[name.replace(old, new)] = factors.pop(name)

    return spoil


def twice(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors |= {name.replace(".base_layer", ""): t.clone() for name, t in factors.items() if "base_layer" in name}


def drop(name: str) -> Spoil:
    return lambda config, factors: factors.__delitem__(name)


def change(name: str, make: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda config, factors: factors.update({name: make(factors[name])})


def unknown_tensor(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors[PREFIX + "self_attn.q_proj.lora_C"] = torch.ones(3)


def with_magnitude(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    factors[PREFIX + "self_attn.q_proj.lora_magnitude_vector"] = torch.ones(144)


def saved_experts(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config["modules_to_save"] = ["gate_up_proj"]
    factors[PREFIX + "mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 192)


Q_A = PREFIX + "self_attn.q_proj.lora_A.weight"
Q_B = PREFIX + "self_attn.q_proj.lora_B.weight"
DOWN_A = PREFIX + "mlp.experts.lora_A.weight"
REFUSED: dict[str, tuple[Spoil, str]] = {
    "another method": (option("peft_type", "LOHA"), "peft_type 'LOHA' is not read here"),
    "DoRA without magnitudes": (
        option("use_dora", True),
        "use_dora is true, but blocks.0.attn.k has no lora_magnitude",
    ),
    "a magnitude without DoRA": (with_magnitude, "is a magnitude of DoRA, but use_dora is false"),
    "a bias in B": (option("lora_bias", True), "option lora_bias"),
    "trained biases": (option("bias", "lora_only"), "option bias = 'lora_only'"),
    "transposed": (option("fan_in_fan_out", True), "option fan_in_fan_out"),
    "whole modules": (option("modules_to_save", ["lm_head"]), "modules_to_save names 'lm_head', but the file holds no"),
    "packed experts in full": (saved_experts, "cannot replace a weight of this model: its experts are packed"),
    "an unknown order": (option("lora_B_layout", "sideways"), "lora_B_layout 'sideways' is unknown"),
    "trained by Unsloth": (
        option("auto_mapping", {"unsloth_fixed": True}),
        "unsloth_fixed shows that Unsloth made this .* set the option lora_B_layout",
    ),
    "on a base of Unsloth": (
        option("base_model_name_or_path", "unsloth/gpt-oss-20b"),
        "the base model 'unsloth/gpt-oss-20b' shows",
    ),
    "the embedding": (
        rename("self_attn.q_proj.lora_A.weight", "self_attn.q_proj.lora_embedding_A"),
        "adapts the embedding, which is not supported",
    ),
    "trained tokens": (option("trainable_token_indices", [1]), "option trainable_token_indices"),
    "repeated layers": (option("layer_replication", [[0, 2]]), "option layer_replication"),
    "another base": (option("init_lora_weights", "pissa_niter_4"), "option init_lora_weights = 'pissa_niter_4'"),
    "an option of tomorrow": (option("use_wonder", 2), "option use_wonder = 2"),
    "no rank": (option("r", 0), "rank 0, expected a positive whole number"),
    "no alpha": (option("lora_alpha", "many"), "lora_alpha 'many', expected a number"),
    "a broken pattern": (option("alpha_pattern", {"q_proj(": 1}), r"'q_proj\(', which is not a pattern"),
    "another rank": (option("r", 4), r"lora_A.weight' has shape \[24, 64\], the model and the rank want \[32, 64\]"),
    "the unembedding": (
        rename("model.layers.0.self_attn.q_proj", "lm_head"),
        r"'lm_head' has factors A \[3, 64\] and B \[144, 3\], the model maps 64 to 101",
    ),
    "no such layer": (rename("layers.2.", "layers.7."), r"layers\.7\.[\w.]+' cannot be adapted in this model"),
    "the same twice": (twice, "mlp.experts.gate_up is adapted twice"),
    "two adapters": (
        lambda config, factors: factors.update({Q_A.replace("lora_A", "lora_A.other"): factors[Q_A].clone()}),
        "adapt the same module: save one adapter",
    ),
    "an adapter of MLX": (option("fine_tune_type", "lora"), r"is of an adapter of MLX: fuse it \(mlx_lm.fuse\)"),
    "not a factor": (unknown_tensor, "q_proj.lora_C' is not a LoRA factor and cannot replace a weight"),
    "half a pair": (drop(Q_B), "lora_A without its other factor: the file is incomplete"),
    "another size": (
        change(Q_A, lambda t: t[:, :32]),
        r"q_proj' has factors A \[3, 32\] and B \[144, 3\], the model maps 64 to 144",
    ),
    "another number of experts": (
        change(DOWN_A, lambda t: t[:-3]),
        r"shape \[21, 96\], the model and the rank want \[24, 96\]",
    ),
    "whole numbers": (change(Q_A, lambda t: t.to(torch.int32)), "dtype I32, wanted BF16 or F16 or F32"),
    "not finite": (change(Q_A, lambda t: t * torch.nan), "the factors of blocks.0.attn.q are not finite"),
    "nothing": (
        lambda config, factors: factors.clear(),
        "holds no LoRA factor: expected tensors such as lora_A and lora_B",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_read_is_refused_by_name(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]], case: str, tmp_path: Path
) -> None:
    spoil, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refused:
        load_adapter(adapted_models[0], spoilt(adapter_folders["all"][0], tmp_path, spoil))
    assert "\n" not in str(refused.value)
    assert not any(".lora." in name for name in adapted_models[0].state_dict()), "something was attached"


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def no_object(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "has no adapter_config.json"),
        (not_json, "is not JSON that can be read"),
        (no_object, "peft_type .* is not read here"),
        (without_weights, "adapter_model.safetensors cannot be read"),
        (pickled, "adapter_model.bin is a pickle"),
        (truncated, "beyond the file: truncated"),
    ],
)
def test_an_incomplete_folder_is_refused(
    adapted_models: tuple[GptOss, GptOss],
    adapter_folders: dict[str, tuple[Path, Tensor]],
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(adapter_folders["all"][0], tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_adapter(adapted_models[0], folder)


def test_factors_that_changed_places_are_refused(adapted_models: tuple[GptOss, GptOss], tmp_path: Path) -> None:
    hf = to_hf(adapted_models[1])
    for layer in hf.model.layers:
        layer.mlp.experts.is_transposed = False
    with_peft(hf, [], [GATE_UP]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"A \[24, 192\] and B \[64, 24\], the model maps 64 to 192 or 96 to 64"):
        load_adapter(adapted_models[0], tmp_path)


def test_an_adapter_of_another_model_is_refused(adapter_folders: dict[str, tuple[Path, Tensor]]) -> None:
    with pytest.raises(InputError, match="the model maps 64 to 128"):
        load_adapter(random_model(SHAPES["ratio 8"]), adapter_folders["q_proj"][0])
    shallow = random_model(replace(SHAPES[SHAPE], n_layers=2, windows=(33, None)))
    with pytest.raises(
        InputError,
        match=r"layers\.2\.self_attn\.q_proj' cannot be adapted in this model: .* to 'model.layers.1.mlp.experts'",
    ):
        load_adapter(shallow, adapter_folders["q_proj"][0])
