"""Choose the implementation: Triton for tensors on a CUDA or ROCm device, torch for all others, without a fallback.

Triton exists on Linux only and is imported when the first such tensor arrives.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Return whether x [...] is on a device that runs Triton's kernels; ROCm devices call themselves CUDA."""
    return x.is_cuda


def triton(name: str, x: Tensor) -> ModuleType | None:
    """Return the module `workbench.kernels.gpu.<name>` if x [...] is on a GPU, else None."""
    return importlib.import_module(f"workbench.kernels.gpu.{name}") if on_gpu(x) else None


def without_gradient(*tensors: Tensor) -> bool:
    """Return whether no gradient is wanted of any of the tensors; some kernels have no backward pass."""
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
