"""A low-rank update is added to the output, and `matrix` is the weight with which a plain map gives the same."""

import torch

from workbench.model.low_rank import Linear, LowRank


def linear(scale: float) -> Linear:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(6, 4)
    a, b = torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator)
    layer.lora = LowRank(a, b, scale)
    return layer


def test_the_matrix_includes_the_update() -> None:
    layer, x = linear(0.5), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    assert layer.lora is not None
    torch.testing.assert_close(layer(x), x @ layer.matrix.mT + layer.bias)
    update = 0.5 * layer.lora.a @ layer.lora.b
    torch.testing.assert_close(layer.matrix - layer.weight, update.mT)
    assert not torch.allclose(layer.matrix, layer.weight)


def test_without_an_update_it_is_a_plain_map() -> None:
    layer, x = Linear(6, 4), torch.randn(3, 6)
    assert layer.matrix is layer.weight
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_factors_are_frozen_until_they_are_trained() -> None:
    layer = linear(1.0)
    assert layer.lora is not None
    assert not layer.lora.a.requires_grad
    assert layer.lora.scaled_b is layer.lora.b
