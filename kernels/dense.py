"""A row times a matrix that is stored by outputs, with an optional bias, as the model's dense weights are used.

Decoding multiplies one row or a few. torch reads a bfloat16 matrix for that at a third of the memory's speed, so that
few rows take `workbench.kernels.cpu` on a CPU.

Cost: outputs · inputs multiply-adds a row; reads the matrix once.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.kernels import cpu

FEW = 4  # rows


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*rows outputs"]:
    """Return x · weightᵀ + bias in x's dtype; a narrower weight and bias are widened to it."""
    few = 0 < x.numel() <= FEW * x.shape[-1]
    if few and (products := cpu.compiled(x, weight, bias)) and products.covers_dense(x, weight):
        return products.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return nn.functional.linear(x, weight.to(wide), None if bias is None else bias.to(wide))
