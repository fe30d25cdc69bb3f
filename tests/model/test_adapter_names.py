"""What a module name of an adapter adapts: the four ways of programs to name the experts' matrices."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.model.adapters import PEFT_WARNINGS, Spoil, error, expert_major, spoilt
from tests.model.conftest import BASE
from workbench.model.adapter_names import module_name, targets, targets_of
from workbench.model.transformer import GptOss

pytestmark = PEFT_WARNINGS
KNOWN = targets(BASE)
EXPERTS = "model.layers.1.mlp.experts"


def test_every_matrix_can_be_adapted() -> None:
    parts = [target.part for one in KNOWN.values() for target in one]
    assert len(parts) == len(set(parts)) == BASE.n_layers * 7 + 1
    assert [t.part for t in KNOWN[EXPERTS]] == ["blocks.1.mlp.experts.gate_up", "blocks.1.mlp.experts.down"]


@pytest.mark.parametrize(
    ("module", "part", "expert", "rows"),
    [
        (f"{EXPERTS}.gate_up_projs.3", "gate_up", 3, slice(0, 192, 1)),
        (f"{EXPERTS}.3.gate_proj", "gate_up", 3, slice(0, 192, 2)),
        (f"{EXPERTS}.3.w3", "gate_up", 3, slice(1, 192, 2)),
        (f"{EXPERTS}.w2", "down", None, slice(0, 64, 1)),
    ],
)
def test_an_expert_has_its_number_and_rows(module: str, part: str, expert: int | None, rows: slice) -> None:
    (target,) = targets_of(module, KNOWN)
    assert target.part == f"blocks.1.mlp.experts.{part}"
    assert (target.expert, target.columns) == (expert, rows)
    assert target.adapted_outputs == len(range(*rows.indices(target.outputs)))


@pytest.mark.parametrize("module", [f"{EXPERTS}.8.w1", f"{EXPERTS}.1.w1.2", "model.layers.9.mlp.experts.w1", "w1"])
def test_what_the_model_does_not_have_is_nothing(module: str) -> None:
    assert targets_of(module, KNOWN) == []


def test_wrapped_and_older_names_are_the_same_modules() -> None:
    query = "model.layers.0.self_attn.q_proj"
    assert targets_of(f"{query}.base_layer", KNOWN) == targets_of(query, KNOWN) == KNOWN[query]
    assert targets_of("unembed_tokens", KNOWN) == KNOWN["lm_head"]
    assert targets_of("model.layers.0.mlp.router.linear", KNOWN) == KNOWN["model.layers.0.mlp.router"]


def marked_grouped(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    expert_major(config, factors)
    config |= {"lora_B_layout": "grouped_by_expert", "auto_mapping": {"unsloth_fixed": True}}


def marked_rank_major(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    config |= {"lora_B_layout": "rank_major", "auto_mapping": {"unsloth_fixed": True}}


def marked_wrongly(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    expert_major(config, factors)
    config["lora_B_layout"] = "rank_major"


def stacked_experts(factors: dict[str, Tensor]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return PEFT's factors of experts: (module, gate_up or down) → A [expert rank inputs], B [expert outputs rank]."""
    stacked = {}
    for name in [name for name in factors if "experts" in name and "lora_A" in name]:
        a, b = factors.pop(name).unflatten(0, (-1, 3)), factors.pop(name.replace("lora_A", "lora_B"))
        module = name.partition(".experts")[0] + ".experts."
        stacked[module, "gate_up" if a.shape[-1] == 64 else "down"] = a, b.unflatten(1, (3, -1)).permute(2, 0, 1)
    return stacked


def linear_maps(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    """One linear map for each expert, as in Unsloth's 4-bit models."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for expert in range(len(a)):
            factors[f"{module}{part}_projs.{expert}.lora_A.weight"] = a[expert]
            factors[f"{module}{part}_projs.{expert}.lora_B.weight"] = b[expert]
    config["auto_mapping"] = {"unsloth_fixed": True}


def modules_of_experts(
    config: dict[str, Any], factors: dict[str, Tensor], names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> None:
    """A module for each expert, with gate and up apart."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for expert in range(len(a)):
            rows = (
                {names[0]: b[expert, 0::2], names[1]: b[expert, 1::2]} if part == "gate_up" else {names[2]: b[expert]}
            )
            for name, own in rows.items():
                factors[f"{module}{expert}.{name}.lora_A.weight"] = a[expert].clone()
                factors[f"{module}{expert}.{name}.lora_B.weight"] = own


def up_before_gate(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    modules_of_experts(config, factors, ("up_proj", "gate_proj", "down_proj"))


def numbered_weights(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
    """Factors of all experts along a first axis, with gate, up and down called w1, w3 and w2."""
    for (module, part), (a, b) in stacked_experts(factors).items():
        for name, own in {"w1": b[:, 0::2], "w3": b[:, 1::2]}.items() if part == "gate_up" else [("w2", b)]:
            factors[f"{module}{name}.lora_A.weight"] = a.clone()
            factors[f"{module}{name}.lora_B.weight"] = own


@pytest.mark.parametrize(
    "arrange", [marked_grouped, marked_rank_major, linear_maps, modules_of_experts, numbered_weights]
)
def test_the_same_adapter_under_names_and_orders_of_other_programs(
    adapted_models: tuple[GptOss, GptOss],
    adapter_folders: dict[str, tuple[Path, Tensor]],
    arrange: Spoil,
    tmp_path: Path,
) -> None:
    folder, wanted = adapter_folders["experts"]
    assert error(adapted_models[0], spoilt(folder, tmp_path, arrange), wanted) <= 1e-5


def renamed(pattern: str, replacement: str) -> Spoil:
    def spoil(config: dict[str, Any], factors: dict[str, Tensor]) -> None:
        for name in list(factors):
            factors[re.sub(pattern, replacement, name)] = factors.pop(name)

    return spoil


BEGINNINGS = {
    "without PEFT's": renamed(r"^base_model\.model\.", ""),
    "of the backbone alone": renamed(r"^base_model\.model\.model\.", "base_model.model."),
    "of the bare backbone": renamed(r"^base_model\.model\.model\.", ""),
    "of torch.compile": renamed(r"^base_model\.model\.", "base_model.model._orig_mod."),
    "of distributed training": renamed(r"^", "module."),
    "of a larger model": renamed(r"^base_model\.model\.", "base_model.model.language_model."),
    "of checkpointed layers": renamed(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module."),
    "with the adapter's name": renamed(r"(lora_[AB])\.", r"\1.my_adapter."),
}


@pytest.mark.parametrize("kind", list(BEGINNINGS))
def test_the_same_adapter_under_other_beginnings_of_names(
    adapted_models: tuple[GptOss, GptOss], adapter_folders: dict[str, tuple[Path, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, wanted = adapter_folders["all"]
    assert error(adapted_models[0], spoilt(folder, tmp_path, BEGINNINGS[kind]), wanted) <= 1e-5


@pytest.mark.parametrize("arrange", [marked_wrongly, up_before_gate])
def test_a_wrong_order_is_seen_by_the_comparison(
    adapted_models: tuple[GptOss, GptOss],
    adapter_folders: dict[str, tuple[Path, Tensor]],
    arrange: Spoil,
    tmp_path: Path,
) -> None:
    folder, wanted = adapter_folders["experts"]
    assert error(adapted_models[0], spoilt(folder, tmp_path, arrange), wanted) > 1e-3


@pytest.mark.parametrize(
    ("stored", "module"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts.base_layer"),
        ("module._orig_mod.model.layers.0.mlp.router", "model.layers.0.mlp.router"),
        ("base_model.model.lm_head", "lm_head"),
        ("unembed_tokens", "unembed_tokens"),
        ("vision_tower.layers.0.self_attn.q_proj", "model.vision_tower.layers.0.self_attn.q_proj"),
    ],
)
def test_what_programs_put_before_a_name_is_left_out(stored: str, module: str) -> None:
    assert module_name(stored) == module
    assert bool(targets_of(module_name(stored), KNOWN)) != stored.startswith("vision")
