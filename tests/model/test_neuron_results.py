"""Neurons of routed experts and the other components add up to the residual stream; without one kind they do not."""

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.model.activation_cache import ActivationCache
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokens(model: GptOss) -> Tensor:
    return torch.cat([model.to_tokens("12+34;56*78=9"), model.to_tokens("98-34;56*78=9")])


@pytest.fixture(scope="module")
def cache(model: GptOss, tokens: Tensor) -> ActivationCache:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def test_the_components_add_up_to_the_stream(cache: ActivationCache, model: GptOss) -> None:
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
    cfg = model.cfg
    experts = cfg.n_layers * cfg.experts_per_token * cfg.d_mlp
    assert len(labels) == len(stack) == cfg.n_layers * (cfg.n_heads + 1) + experts + 2
    torch.testing.assert_close(stack.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)
    biases = [i for i, label in enumerate(labels) if label.endswith("expert_bias")]
    assert (stack.sum(0) - stack[biases].sum(0) - cache["resid_post", -1]).abs().max() > 1e-3  # negative control
    middle = cache.get_full_resid_decomposition(2, mlp_input=True)
    torch.testing.assert_close(middle.sum(0), cache["resid_mid", 2], rtol=1e-4, atol=1e-4)


def test_projections_add_up_to_the_logit(cache: ActivationCache, model: GptOss, tokens: Tensor) -> None:
    right = model.to_single_token("7")
    direction = model.tokens_to_residual_directions("7")
    parts = cache.get_full_resid_decomposition(pos_slice=-1, apply_ln=True, project_output_onto=direction)
    with torch.no_grad():
        logits = model(tokens)[:, -1, right]
    torch.testing.assert_close(parts.sum(0), logits, rtol=1e-4, atol=1e-4)
    wide = cache.get_full_resid_decomposition(pos_slice=-1) @ direction
    narrow = cache.get_full_resid_decomposition(pos_slice=-1, project_output_onto=direction)
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4)


def test_a_neuron_is_its_activation_times_its_direction(cache: ActivationCache, model: GptOss) -> None:
    results = cache.get_neuron_results(1)
    slot, neuron = 2, 5
    for batch, pos in ((0, 3), (1, 7)):
        expert = int(cache["expert_indices", 1][batch, pos, slot])
        amount = cache["post", 1][batch, pos, slot, neuron] * cache["expert_weights", 1][batch, pos, slot]
        wanted = amount * model.blocks[1].mlp.experts.W_out(expert)[neuron].float()
        torch.testing.assert_close(results[batch, pos, slot * model.cfg.d_mlp + neuron], wanted)
    one = cache.get_neuron_results(1, neuron_slice=neuron, pos_slice=3)
    torch.testing.assert_close(one[:, slot], results[:, 3, slot * model.cfg.d_mlp + neuron])
    stack, labels = cache.stack_neuron_results(2, neuron_slice=[5], incl_remainder=True, return_labels=True)
    assert labels[:2] == ["L0S0N5", "L0S1N5"]
    assert labels[-1] == "remainder"
    torch.testing.assert_close(stack.sum(0), cache["resid_post", 1], rtol=1e-4, atol=1e-4)
