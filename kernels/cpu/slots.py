"""SwiGLU and the sum over the slots of a layer's experts, on any number of bfloat16 rows: launchers of `slot_loops`.

Both compute in float32 and round once. Reference: `workbench.kernels.moe`, which does the same in torch with several
passes over memory.
"""

import functools

from jaxtyping import BFloat16, Float
from torch import Tensor

from workbench.kernels.cpu import slot_loops, threads
from workbench.kernels.cpu.slot_loops import ACTIVATIONS
from workbench.kernels.cpu.vectors import LANES

_loops = functools.cache(slot_loops.compile_all)


def covers(width: int) -> bool:
    """Return whether rows of this many values can be computed."""
    return width > 0 and width % LANES == 0


def swiglu(
    pairs: BFloat16[Tensor, "*rows 2*d_mlp"],
    limit: float,
    alpha: float,
    result: BFloat16[Tensor, "*rows d_mlp"] | None = None,
) -> BFloat16[Tensor, "*rows d_mlp"]:
    """Return the activations of gates and ups, which alternate, in new memory by default; `covers` their width."""
    pairs = pairs.contiguous()
    if result is None:
        result = pairs.new_empty(*pairs.shape[:-1], pairs.shape[-1] // 2)
    pieces = -(-result.numel() // ACTIVATIONS)
    threads.run(_loops().activate, pieces, pairs.data_ptr(), result.numel(), limit, alpha, result.data_ptr())
    return result


def combine(
    out: BFloat16[Tensor, "tokens slot d_model"], gates: Float[Tensor, "tokens slot"]
) -> BFloat16[Tensor, "tokens d_model"]:
    """Return the sum over the slots, times their gates; `covers` d_model."""
    out, gates = out.contiguous(), gates.float().contiguous()
    rows, count, width = out.shape
    total = out.new_empty(rows, width)
    threads.run(
        _loops().combine, rows, out.data_ptr(), gates.data_ptr(), rows, count, width, total.data_ptr()
    )  # fmt: skip
    return total
