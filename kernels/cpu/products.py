"""The launchers: products of a few rows of tensors, in the order, the dtypes and the roundings of the torch code.

Sums are in float32, with the bias; what is returned is rounded once to the dtype of the input.

Reference: `workbench.kernels.dense.linear` and `workbench.kernels.mxfp4.linear`.
Cost: reads the weights of every expert that is hit, or the whole dense matrix, once for each four rows; from memory
once.
"""

import functools

import torch
from jaxtyping import BFloat16, Float, Float32, Int, UInt8
from torch import Tensor

from workbench.kernels.cpu import loops, threads, unpacking_loops
from workbench.kernels.cpu.loops import SMALLEST
from workbench.kernels.cpu.vectors import GROUP, LANES
from workbench.kernels.ggml import BLOCK_BYTES, GgmlMxfp4
from workbench.kernels.mxfp4 import Mxfp4

_DTYPES = (torch.bfloat16, torch.float32)
_DENSE_CHUNK = 64  # outputs; 369 KB of a matrix with 2,880 inputs
_EXPERT_CHUNK = 128  # outputs; 196 KB

_loops = functools.cache(loops.compile_all)
_unpacking = functools.cache(unpacking_loops.compile_all)


@functools.cache
def scale_table() -> Float[Tensor, "256"]:
    """Return for each scale byte its power of two [256]: 255 is NaN, and 0 the subnormal 2^-127."""
    return torch.ldexp(torch.ones(256), torch.arange(256) - 127).where(torch.arange(256) < 255, torch.nan)


def covers_dense(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear` can multiply x [rows d_in] and a bfloat16 weight [d_out d_in]."""
    return (
        weight.dtype == torch.bfloat16
        and x.dtype in _DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % GROUP == 0
        and len(weight) >= SMALLEST
    )


def linear(
    x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "*rows outputs"]:
    """Return x · weightᵀ + bias, for what `covers_dense` allows."""
    inputs = x.reshape(-1, x.shape[-1]).float().contiguous()
    rows, outputs = len(inputs), len(weight)
    results = torch.empty(rows, outputs)
    pieces = -(-outputs // _DENSE_CHUNK)
    threads.run(
        _loops().dense_rows, pieces, _DENSE_CHUNK, weight.data_ptr(), outputs, weight.shape[1] // GROUP,
        inputs.data_ptr(), rows, results.data_ptr(),
    )  # fmt: skip
    if bias is not None:
        results += bias
    return results.to(x.dtype).unflatten(0, x.shape[:-1])


class Slots:
    """Slots by their experts, for both matrices of a layer."""

    def __init__(self, experts: Int[Tensor, "tokens slot"], num_experts: int) -> None:
        flat = experts.flatten()
        counts = torch.bincount(flat, minlength=num_experts)  # refuses negative ones
        if len(counts) > num_experts:
            raise IndexError(f"expert {len(counts) - 1} of {num_experts}: hooks must leave indices below that number")
        self.experts, self.per_token = experts, experts.shape[1]
        self.order: Int[Tensor, " slots"] = flat.argsort(stable=True)
        self.hit: Int[Tensor, " hit"] = counts.nonzero()[:, 0].contiguous()
        self.ends: Int[Tensor, " hit"] = counts[self.hit].cumsum(0)


def covers_experts(x: Tensor, *matrices: object) -> bool:
    """Return whether `expert_linear` can multiply x [rows d_in] by these matrices [expert d_in d_out]."""
    return x.dtype in _DTYPES and all(_covers(matrix, x.device) for matrix in matrices)


def _covers(matrix: object, device: torch.device) -> bool:
    if not isinstance(matrix, Mxfp4 | GgmlMxfp4):
        return False
    tensors = matrix if isinstance(matrix, Mxfp4) else matrix.parts
    return tensors[0].shape[1] >= SMALLEST and all(t.is_contiguous() and t.device == device for t in tensors)


def expert_linear(
    x: Float[Tensor, "rows inputs"],
    weight: Mxfp4 | GgmlMxfp4,
    bias: Float[Tensor, "expert outputs"],
    slots: Slots,
) -> Float[Tensor, "tokens slot outputs"]:
    """Return x times its expert's matrix, plus its bias, for every slot; x has one row for each token or slot.

    Matrices as a GGUF file holds them are read in place, with the same results bit for bit.
    """
    halves = isinstance(weight, GgmlMxfp4) and weight.halves
    groups = x.shape[1] // GROUP
    inputs = x.float() if halves else x.float().unflatten(1, (groups, GROUP // 2, 2)).mT
    inputs = inputs.contiguous()
    if isinstance(weight, Mxfp4):
        layout = (weight.blocks.data_ptr(), weight.scales.data_ptr(), GROUP // 2, 1, 0)
        results = _expert_products(inputs, weight.blocks.shape[1], layout, slots)
    else:  # a block is its scale and then its bytes
        layouts = [(p.data_ptr() + 1, p.data_ptr(), BLOCK_BYTES, BLOCK_BYTES, int(halves)) for p in weight.parts]
        parts = [_expert_products(inputs, weight.parts[0].shape[1], layout, slots) for layout in layouts]
        results = parts[0] if len(parts) == 1 else torch.stack(parts, -1).flatten(-2)
    return results.add_(bias[slots.experts]).to(x.dtype)


def _expert_products(
    inputs: Float[Tensor, "rows *inputs"], outputs: int, layout: tuple[int, int, int, int, int], slots: Slots
) -> Float[Tensor, "tokens slot outputs"]:
    """Return the products in float32. layout: addresses of blocks and scales, bytes between them, order of nibbles."""
    blocks, scales, block, scale, halves = layout
    count, groups = slots.experts.numel(), inputs[0].numel() // GROUP
    results = torch.empty(*slots.experts.shape, outputs)
    pieces = len(slots.hit) * -(-outputs // _EXPERT_CHUNK)
    threads.run(
        _loops().expert_rows, pieces, _EXPERT_CHUNK, blocks, scales, scale_table().data_ptr(), block, scale, halves,
        outputs, groups, inputs.data_ptr(), results.data_ptr(), slots.order.data_ptr(), count // len(inputs),
        len(slots.hit), slots.hit.data_ptr(), slots.ends.data_ptr(),
    )  # fmt: skip
    return results


def covers_unpacking(blocks: Tensor, scales: Tensor) -> bool:
    """Return whether `unpack` can read these blocks [... group 16] and scales [... group]."""
    return blocks.is_contiguous() and scales.is_contiguous()


def unpack(
    blocks: UInt8[Tensor, "*stack group 16"],
    scales: UInt8[Tensor, "*stack group"],
    values: BFloat16[Tensor, "*stack columns"],
) -> None:
    """Write the packed values into memory that is given, on this thread alone.

    Measured, one thread (Zen 4), 5760 × 2880 in chunks of 256 rows: 1.0 ms, torch 7.4 ms.
    """
    loop = _unpacking().groups
    loop(blocks.data_ptr(), scales.data_ptr(), scale_table().data_ptr(), scales.numel(), values.data_ptr())


def unpack_columns(
    blocks: UInt8[Tensor, "outputs group 16"],
    scales: UInt8[Tensor, "outputs group"],
    values: Float32[Tensor, "inputs outputs"],
) -> None:
    """Write the packed values into memory that is given, on this thread alone; LANES must divide the outputs.

    A matrix in this order is multiplied by few rows in less time than one by outputs: torch need not reorder it.
    """
    outputs, groups = scales.shape
    loop = _unpacking().columns
    loop(blocks.data_ptr(), scales.data_ptr(), scale_table().data_ptr(), groups, outputs, values.data_ptr())


def covers_widening(weight: Tensor) -> bool:
    """Return whether `widen_columns` can read all rows of this weight [outputs inputs], and any 16 of them."""
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and not any(n % LANES for n in weight.shape)


def widen_columns(weight: BFloat16[Tensor, "outputs inputs"], values: Float32[Tensor, "inputs outputs"]) -> None:
    """Write a matrix into memory that is given, in the order of `unpack_columns`, on this thread alone."""
    outputs, inputs = weight.shape
    _unpacking().widened_columns(weight.data_ptr(), inputs, outputs, values.data_ptr())
