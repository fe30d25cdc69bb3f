"""What a hook returns has the shape of the activation, and experts that the layer has: nothing is broadcast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.errors import InputError
from workbench.hooks.hook_points import CheckedHookPoint
from workbench.model.transformer import GptOss

TOKENS = torch.tensor([[5, 6, 7, 8]])
INDICES = "blocks.1.mlp.hook_expert_indices"
POINTS = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_sink",
    "blocks.1.mlp.router.hook_out",
    "blocks.1.mlp.hook_expert_weights",
    "blocks.1.mlp.experts.hook_out",
    INDICES,
    "ln_final.hook_scale",
    "unembed.hook_out",
]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", device="cpu")


def run(model: GptOss, point: str, edit: Callable[[Tensor], Any]) -> Tensor:
    hook = (point, lambda activation, hook: edit(activation))
    result: Tensor = model.run_with_hooks(TOKENS, fwd_hooks=[hook])
    return result


@pytest.mark.parametrize("point", POINTS)
@torch.no_grad()
def test_another_shape_is_refused_at_every_point(model: GptOss, point: str) -> None:
    with pytest.raises(InputError, match=rf"^a hook at {point} returned shape .*: return a tensor of the same shape"):
        run(model, point, lambda activation: activation[:, :1])
    assert run(model, point, lambda activation: activation.clone()).equal(model(TOKENS))  # negative control


@torch.no_grad()
def test_a_point_of_transformer_lens_broadcasts_another_shape(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the check the result is another one, without an error."""
    monkeypatch.setattr(CheckedHookPoint, "__call__", torch.nn.Module.__call__)
    logits = run(model, "blocks.1.hook_attn_out", lambda activation: activation[:, :1])
    assert logits.shape == model(TOKENS).shape
    assert not logits.equal(model(TOKENS))


@torch.no_grad()
def test_what_is_no_tensor_is_refused_and_none_leaves_the_activation(model: GptOss) -> None:
    with pytest.raises(InputError, match=r"^a hook at .* returned str: return a tensor, or None"):
        run(model, "blocks.0.hook_resid_pre", lambda activation: "x")
    assert run(model, "blocks.0.hook_resid_pre", lambda activation: None).equal(model(TOKENS))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda ids: ids * 0 + 99, "selected the experts 99 to 99; the layer has 0 to 15"),
        (lambda ids: setattr(ids, "data", ids.data.fill_(-3)), "selected the experts -3 to -3; the layer has 0 to 15"),
        (lambda ids: ids.float(), "returned torch.float32: experts are whole numbers"),
    ],
    ids=["returned", "in place", "floats"],
)
@torch.no_grad()
def test_experts_that_the_layer_lacks_are_refused(model: GptOss, edit: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(model, INDICES, edit)
    run(model, INDICES, lambda ids: ids * 0 + 15)  # negative control
