"""Matrix products of a few rows on a CPU, compiled for the processor: what decoding spends its time on.

torch multiplies one row by a bfloat16 matrix at about a third of the memory's speed, and has no product with MXFP4: the
matrix is unpacked first. The loops here read every weight once, as it is stored. They are compiled by numba when the
first of them is needed (about 12 s of processor time in all, then kept on disk, in `NUMBA_CACHE_DIR` if that is set).

Why numba: its wheels contain the compiler, for Linux (x86-64, arm64), macOS (arm64) and Windows and for Python 3.11 to
3.14, so that nothing is built when the workbench is installed, and the code is made for the processor it runs on. An
extension module would need a wheel for each of these and its own choice between instruction sets. Measured on two cores
(Zen 4), a matrix of 5760 × 2880 in MXFP4 and one row, 10^9 values a second: torch 2, numba's own vectorisation 5.7,
LLVM vectors through numba 25 on one thread, at which the memory is the limit.

`layer` computes a complete layer on one new token of each of up to four rows in one launch; between two phases of it a
hook may read and change a value (`workbench.model.fused_block`). Besides what it saves in Python, it keeps torch's own
threads asleep: after each parallel operation they wait actively for milliseconds, on the cores that these loops need.

`tiles` multiplies many rows where the processor multiplies bfloat16 slowly and has AVX-512; elsewhere torch does it,
with matrices that `products` unpacks or widens. `slots` computes what lies between the products of the experts,
`positions` the norms and rotations, `sequences` attention of many queries.

The torch code in `workbench.kernels` remains the reference. It computes whatever is not covered here: gradients, other
dtypes, inputs that are no multiple of 32, many rows, processors without AVX2 or NEON, tensors that torch.compile,
torch.func or a dispatch mode follow, and a Python without numba. `WORKBENCH_CPU_KERNELS=torch` chooses it everywhere,
`WORKBENCH_CPU_KERNELS=compiled` makes a missing numba an error. `workbench info` and `workbench bench cpu` print the
choice. Threads: as many as `torch.get_num_threads()`.
"""

import functools
import importlib
import os
import platform
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from workbench.kernels import dispatch

VARIABLE = "WORKBENCH_CPU_KERNELS"
FEW_ROWS = 32
_CHOICES = ("auto", "compiled", "torch")


@functools.cache
def unavailable() -> str | None:
    """Return why the compiled kernels cannot be used, or None where they can; asked once a process.

    Raises:
        ValueError: the environment variable has an unknown value, or demands what is not available.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: expected one of {', '.join(_CHOICES)}")
    reason = f"{VARIABLE} is 'torch'" if choice == "torch" else _missing()
    if reason and choice == "compiled":
        raise ValueError(f"{VARIABLE} is 'compiled', but {reason}; unset it to use torch instead")
    return reason


def _missing() -> str | None:
    """Return the reason why the compiled kernels are not available here."""
    try:
        instructions = importlib.import_module("workbench.kernels.cpu.vectors").instructions()
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return None if instructions else f"the processor ({platform.machine()}) has neither AVX2 nor NEON"


def description() -> str:
    """Return which code multiplies a few rows on this CPU, as text for users."""
    if reason := unavailable():
        return f"torch ({reason})"
    return f"compiled by numba for {importlib.import_module('workbench.kernels.cpu.vectors').instructions()}"


def compiled(*tensors: Tensor | None) -> ModuleType | None:
    """Return `workbench.kernels.cpu.products` if it can be applied to these tensors, and nothing otherwise."""
    if not all(tensor is None or _plain(tensor) for tensor in tensors) or _followed() or unavailable():
        return None
    return importlib.import_module("workbench.kernels.cpu.products")


@functools.cache
def _widens() -> bool:
    """Return whether products of bfloat16 are faster in float32 on this processor; asked once a process."""
    return not importlib.import_module("workbench.kernels.cpu.vectors").multiplies_bfloat16()


def product_dtype(x: Tensor, *tensors: Tensor | None) -> torch.dtype:
    """Return the dtype in which to multiply many rows x [... d] by matrices: float32 or the dtype of x.

    Where the processor multiplies bfloat16 slowly, values of bfloat16 are widened: their products are exact in float32,
    in which both ways add them up. Measured, one thread (Emerald Rapids without AMX), 512 rows times 5760 × 2880:
    86 GFLOP/s in bfloat16, 155 in float32.
    """
    wide = x.dtype == torch.bfloat16 and compiled(x, *tensors) is not None and _widens()
    return torch.float32 if wide else x.dtype


def many_rows(x: Tensor, *tensors: Tensor | None) -> ModuleType | None:
    """Return `workbench.kernels.cpu.tiles` where many rows x [... d] are multiplied in float32 by its loops."""
    if x.numel() == 0 or product_dtype(x, *tensors) == x.dtype:
        return None
    tiles = importlib.import_module("workbench.kernels.cpu.tiles")
    return tiles if tiles.available() else None


def many_queries(q: Tensor, *tensors: Tensor | None) -> ModuleType | None:
    """Return `workbench.kernels.cpu.sequences` where attention of queries q [... d] in float32 takes its loops."""
    return importlib.import_module("workbench.kernels.cpu.sequences") if many_rows(q, *tensors) else None


def few_rows(x: Tensor, *tensors: Tensor | None) -> ModuleType | None:
    """Return `workbench.kernels.cpu.layer` if x [... d] is a few rows of bfloat16 and all tensors can be used."""
    few = x.dtype == torch.bfloat16 and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
    if not few or not compiled(x, *tensors):
        return None
    return importlib.import_module("workbench.kernels.cpu.layer")


def position_steps(x: Tensor, *others: Tensor) -> ModuleType | None:
    """Return `workbench.kernels.cpu.positions` if x and the others [... d] are bfloat16, to which it can be applied."""
    if any(tensor.dtype != torch.bfloat16 for tensor in (x, *others)) or not compiled(x, *others):
        return None
    return importlib.import_module("workbench.kernels.cpu.positions")


def slot_steps(rows: Sequence[Tensor], *others: Tensor) -> ModuleType | None:
    """Return `workbench.kernels.cpu.slots` if these rows [... d] are bfloat16 and it can be applied to all tensors."""
    if any(tensor.dtype != torch.bfloat16 for tensor in rows) or not compiled(*rows, *others):
        return None
    return importlib.import_module("workbench.kernels.cpu.slots")


def compile_loops() -> None:
    """Compile all loops that this processor uses now, and not when each is first needed."""
    names = ("layer", "positions", "products", "sequences", "slots", "tiles")
    layer, positions, products, sequences, slots, tiles = (
        importlib.import_module(f"workbench.kernels.cpu.{n}") for n in names
    )
    for compile_some in (products._loops, products._unpacking, layer._phases, positions._loops, slots._loops):
        compile_some()
    if tiles.available():
        sequences._loops()
        tiles._dense()
        tiles._integer()


def _plain(tensor: Tensor) -> bool:
    """Return whether a tensor is ordinary memory that no gradient is wanted of."""
    wants_gradient = tensor.requires_grad and torch.is_grad_enabled()
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return ordinary and not wants_gradient and not dispatch.on_gpu(tensor)


def _followed() -> bool:
    """Return whether torch follows its operators (traces, transforms or counts them) and must see all of them."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
