"""A row times a matrix that is stored by outputs, with an optional bias, as the model's dense weights are used.

Decoding multiplies one row or a few. torch reads a bfloat16 matrix for that at a third of the memory's speed, so that
few rows take `workbench.kernels.cpu` on a CPU. Many rows are multiplied in float32 where the processor multiplies
bfloat16 slowly: the matrix is widened a few outputs at a time, so that it stays in cache. With AVX-512 they take the
tiles of `workbench.kernels.cpu.tiles`.

Cost: outputs · inputs multiply-adds a row; reads the matrix once.
"""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.kernels import cpu
from workbench.kernels.parallel import parallel_map

FEW = 4  # rows
_SEVERAL = 5  # rows, above the few, from which the compiled loops multiply tiles of the matrix
_MANY = 24  # rows from which widening the matrix costs less than multiplying in float32 saves
_SHARES = 3  # of the chunks, for each thread
_CHUNK = 96 * 2880  # values of a widened matrix at a time


def linear(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*rows outputs"]:
    """Return x · weightᵀ + bias in x's dtype; a narrower weight and bias are widened to it."""
    few = 0 < x.numel() <= FEW * x.shape[-1]
    if few and (products := cpu.compiled(x, weight, bias)) and products.covers_dense(x, weight):
        return products.linear(x, weight, bias)
    if x.numel() >= _SEVERAL * x.shape[-1] and (tiles := cpu.many_rows(x, weight, bias)) and tiles.covers_dense(weight):
        return tiles.dense_linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    many = x.numel() >= _MANY * x.shape[-1] > 0 and cpu.product_dtype(x, weight, bias) != x.dtype
    if many and (products := cpu.compiled(x)) and products.covers_widening(weight):
        return _widened(x, weight, bias, products)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return nn.functional.linear(x, weight.to(wide), None if bias is None else bias.to(wide))


def _widened(
    x: Float[Tensor, "*rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    products: ModuleType,
) -> Float[Tensor, "*rows outputs"]:
    """Return x · weightᵀ + bias, computed in float32 and rounded once to the dtype of x."""
    width = weight.shape[1]
    inputs = x.reshape(-1, width).float()
    results = x.new_empty(len(inputs), len(weight))
    step = max(16, _CHUNK // width // 16 * 16)

    def multiply(starts: range) -> None:
        memory = torch.empty(step * width)
        for start in starts:
            outputs = slice(start, start + step)
            rows = weight[outputs]
            values = memory[: rows.numel()].view(width, len(rows))
            products.widen_columns(rows, values)
            product = inputs @ values
            results[:, outputs] = product if bias is None else product.add_(bias[outputs])

    starts, threads = range(0, len(weight), step), torch.get_num_threads()
    if threads == 1:
        multiply(starts)
    else:
        share = -(-len(starts) // (_SHARES * threads))
        parallel_map(multiply, [starts[n : n + share] for n in range(0, len(starts), share)])
    return results.unflatten(0, x.shape[:-1])
