"""Sums and sums of squares by label on the GPU, the same on every run.

Tokens are sorted by label; a label's run is cut into pieces of SPLIT tokens, one program each, and a second kernel
adds a label's pieces in their order. No atomics, and no sum in float32 runs over more than some hundred terms.

Reference: `workbench.kernels.moments`.
Cost for T tokens: reads x once and 12 bytes a token to sort; writes and reads 8 · d bytes a piece, of which there are
at most T / SPLIT + labels.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.common import on_device_of_first
from workbench.kernels.moments import Moments


@triton.jit
def _pieces(
    x, order, offsets, ends, owner, sums, squares, D, n_labels,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Moments of one piece: at most SPLIT tokens of one label."""
    piece = tl.program_id(0).to(tl.int64)
    label = tl.load(owner + piece)
    if label >= n_labels:
        return
    first = tl.load(ends + label - 1, mask=label > 0, other=0)
    start = tl.load(offsets + label) + (piece - first) * SPLIT
    end = tl.minimum(tl.load(offsets + label + 1), start + SPLIT)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(start, end, BLOCK_M):
        place = at + tl.arange(0, BLOCK_M)
        token = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        inside = (place < end)[:, None] & (d < D)[None, :]
        rows = tl.load(x + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += rows
        square += rows * rows
    tl.store(sums + piece * D + d, tl.sum(total, 0), mask=d < D)
    tl.store(squares + piece * D + d, tl.sum(square, 0), mask=d < D)


@triton.jit
def _add(
    sums, squares, ends, out_sums, out_squares, D, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Moments of one label from those of its pieces."""
    label = tl.program_id(0).to(tl.int64)
    start, end = tl.load(ends + label - 1, mask=label > 0, other=0), tl.load(ends + label)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(start, end, BLOCK_M):
        piece = (at + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (piece < end)[:, None] & (d < D)[None, :]
        total += tl.load(sums + piece[:, None] * D + d[None, :], mask=inside, other=0.0)
        square += tl.load(squares + piece[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out_sums + label * D + d, tl.sum(total, 0), mask=d < D)
    tl.store(out_squares + label * D + d, tl.sum(square, 0), mask=d < D)


@on_device_of_first
def moments(x: Float[Tensor, "tokens d"], labels: Int[Tensor, "tokens"], n_labels: int) -> Moments:
    """Return moments of the rows of each label 0 … n_labels − 1; rows of any other label are left out."""
    tile = tiles.moments_tile()
    split, (tokens, d), x = tile.blocks["SPLIT"], x.shape, x.contiguous()
    ordered, order = labels.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(n_labels + 1, device=x.device))
    ends = (offsets.diff() + (split - 1)).div(split, rounding_mode="floor").cumsum(0)
    most = (tokens + min(tokens, n_labels) * (split - 1)) // split
    owner = torch.searchsorted(ends, torch.arange(most, device=x.device), right=True)
    partial = torch.empty(2, most, d, dtype=torch.float32, device=x.device)
    out = torch.empty(2, n_labels, d, dtype=torch.float32, device=x.device)
    columns = triton.cdiv(d, tile.blocks["BLOCK_D"])
    options = {**tile.blocks, **tile.options}
    _pieces[(most, columns)](x, order, offsets, ends, owner, *partial, d, n_labels, **options)
    _add[(n_labels, columns)](*partial, ends, *out, d, **options)
    return Moments(offsets.diff(), *out)
