"""What a module name of an adapter adapts: the four ways of programs to name the experts' matrices."""

import pytest

from tests.model.conftest import BASE
from workbench.model.adapter_names import module_name, targets, targets_of

KNOWN = targets(BASE)
EXPERTS = "model.layers.1.mlp.experts"


def test_every_matrix_can_be_adapted() -> None:
    parts = [target.part for found in KNOWN.values() for target in found]
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
