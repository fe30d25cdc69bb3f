"""What every Triton kernel here needs: matrix products that are also right under Triton's interpreter.

The interpreter (TRITON_INTERPRET=1: the same launchers on CPU tensors) multiplies bfloat16 as if it were integers,
truncates when it rounds to it, and reads its subnormals as zero (Triton 3.9, measured). So products go through `dot`,
which widens there, element-wise maths is done in float32, and stores to bfloat16 go through `narrow`.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_first(launcher: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher with the GPU of its first argument as the current device, which is where Triton launches.

    The model does so for each block. Launchers that are called elsewhere would otherwise run on the wrong card.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):  # does nothing for a tensor on the CPU
            return launcher(*args, **kwargs)

    return launch


@triton.jit
def dot(a, b, acc):
    """Return acc + a · b: tensor cores for 16-bit operands, full float32 (never TF32) for 32-bit ones."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return float32 rounded to `dtype`, to the nearest (even), also where the interpreter would truncate."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # noqa: PLR0124 - NaN
    return x.to(dtype)
