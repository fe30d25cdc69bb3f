"""Experts that are stored one by one are the same stacked tensors, whatever their names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.test_stored_names import CFG, written
from workbench.errors import InputError
from workbench.model.checkpoint import open_checkpoint
from workbench.model.export import RandomTensors

Tensors = dict[str, Tensor]
LAYER = "model.layers.1.mlp.experts."


def separate(tensors: Tensors, names: Callable[[str, int], str], *, fused: bool) -> Tensors:
    """Give every expert linear maps of its own; names: from gate, up, gate_up or down and a number to a module."""
    tensors_written = {}
    for name, tensor in tensors.items():
        module, of_experts, rest = name.partition(".mlp.experts.")
        if not of_experts:
            tensors_written[name.replace("mlp.router.", "mlp.router.linear.")] = tensor
            continue
        part, kind = rest.removesuffix("_bias").removesuffix("_proj"), "bias" if rest.endswith("_bias") else "weight"
        for n, own in enumerate(tensor):
            rows = own.mT if kind == "weight" else own
            halves = {"gate": rows[0::2], "up": rows[1::2]} if part == "gate_up" and not fused else {part: rows}
            for half, values in halves.items():
                tensors_written[f"{module}.mlp.experts.{names(half, n)}.{kind}"] = values.contiguous()
    return tensors_written


def as_unsloth(tensors: Tensors) -> Tensors:
    return separate(tensors, lambda part, n: f"{part}_projs.{n}", fused=True)


def as_modules(tensors: Tensors) -> Tensors:
    return separate(tensors, lambda part, n: f"{n}.{part}_proj", fused=False)


def gate_and_up_exchanged(tensors: Tensors) -> Tensors:
    other = {"gate": "up", "up": "gate", "down": "down"}
    return separate(tensors, lambda part, n: f"{n}.{other[part]}_proj", fused=False)


@pytest.mark.parametrize("change", [as_unsloth, as_modules])
def test_stacks_are_the_same_tensors(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model", "dense", change))
    assert (checkpoint.experts, checkpoint.cfg, checkpoint.notes) == ("dense", CFG, ())
    for name, tensor in RandomTensors(CFG, experts="dense").items():
        assert torch.equal(checkpoint.tensors[name], tensor), name


def test_gate_and_up_exchanged_are_another_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "model", "dense", gate_and_up_exchanged))
    name = "blocks.0.mlp.experts.gate_up.weight"
    assert not torch.equal(checkpoint.tensors[name], RandomTensors(CFG, experts="dense")[name])


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in as_modules(tensors).items() if n != LAYER + name}


def with_one(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: as_modules(tensors) | {LAYER + name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("3.up_proj.weight"), "15 of 16 tensors of 'model.layers.1.mlp.experts.gate_up_proj' are stored"),
        (without("7.down_proj.bias"), r"down_proj_bias' has shape \[7, 64\], the config requires \[8, 64\]"),
        (
            with_one("2.up_proj.weight", torch.ones(3, 64)),
            r"2.up_proj.weight' is F32 \[3, 64\], and .* BF16 \[96, 64\]",
        ),
        (with_one("gate_up_proj", torch.ones(8, 64, 192)), "which is stored too: remove one of them"),
        (with_one("gate_up_projs.0.weight", torch.ones(192, 64)), "which is stored too: remove one of them"),
    ],
)
def test_what_is_not_there_for_every_expert_is_one_line(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        open_checkpoint(written(tmp_path / "model", "dense", change))
    assert "\n" not in str(refusal.value)
