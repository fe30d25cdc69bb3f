"""RMSNorm and rotation of any number of bfloat16 positions in one pass each: launchers of `position_loops`.

Reference: `workbench.kernels.norm` and `workbench.kernels.rotary`, which make several passes over memory in torch.
"""

import functools

import torch
from jaxtyping import BFloat16, Float, Float32
from torch import Tensor

from workbench.kernels.cpu import position_loops, threads
from workbench.kernels.cpu.position_loops import ROWS
from workbench.kernels.cpu.vectors import LANES

_loops = functools.cache(position_loops.compile_all)


def covers_norm(width: int) -> bool:
    """Return whether rows of this many values can be normalised."""
    return width > 0 and width % LANES == 0


def covers_rotation(width: int) -> bool:
    """Return whether heads of this many values can be rotated."""
    return width > 0 and width % (2 * LANES) == 0


def rms_scale(x: BFloat16[Tensor, "*batch d"], eps: float) -> Float32[Tensor, "*batch 1"]:
    """Return √(mean of squares + eps) of each row; `covers_norm` its width."""
    scales = torch.empty(*x.shape[:-1], 1)
    _norm(x.contiguous(), 0, eps, scales, 0)
    return scales


def rms_norm(
    x: BFloat16[Tensor, "*batch d"], weight: BFloat16[Tensor, " d"], eps: float
) -> BFloat16[Tensor, "*batch d"]:
    """Return x / rms_scale(x) · weight, rounded once; `covers_norm` its width."""
    x, weight = x.contiguous(), weight.contiguous()
    results = torch.empty_like(x)
    _norm(x, weight.data_ptr(), eps, torch.empty(*x.shape[:-1], 1), results.data_ptr())
    return results


def _norm(x: Tensor, weight: int, eps: float, scales: Tensor, results: int) -> None:
    rows, pieces = scales.numel(), -(-scales.numel() // ROWS)
    threads.run(_loops().norm, pieces, x.data_ptr(), weight, rows, x.shape[-1], eps, scales.data_ptr(), results)


def rotate(
    x: BFloat16[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "batch pos half"],
    sin: Float[Tensor, "batch pos half"],
) -> BFloat16[Tensor, "batch pos head d_head"]:
    """Return the heads turned by the angles of their positions, rounded once; `covers_rotation` their width."""
    x, cos, sin = x.contiguous(), *(angle.float().contiguous() for angle in (cos, sin))
    results, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
    threads.run(
        _loops().rotate, -(-rows // ROWS), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, x.shape[2], x.shape[3],
        results.data_ptr(),
    )  # fmt: skip
    return results
