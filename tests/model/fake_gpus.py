"""A machine with several GPUs, played by the CPU: every tensor is somewhere, and none can meet one from elsewhere.

While it is on, a call of torch on tensors of two devices is refused as a GPU would refuse it, and `tensor.device`
says where a tensor is. Where that is hangs on its memory, so that views and parameters are where their tensor is.
They compute on torch's path: `tensor.is_cuda` tells the truth.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CPU, _FIRST = torch.device("cpu"), torch.device("cuda", 0)
_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


class Machine(TorchFunctionMode):
    """Devices named cuda:0, cuda:1 and so on. crossings: the shapes of what went from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[int, ...]] = []
        self._where: dict[int, torch.device] = {}

    def of(self, tensor: Tensor) -> torch.device:
        return self._where.get(tensor.untyped_storage().data_ptr(), _CPU)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            if func == _DEVICE:
                return self.of(args[0])
            if func is torch._has_compatible_shallow_copy_type:
                return False  # Module.to shall make new parameters, not put new memory into the old
            if func in (Tensor.to, Tensor.cpu):
                return self._to(func, *args, **kwargs)
            target = torch.device(kwargs.get("device") or _CPU)
            if target.type == "cuda":
                kwargs["device"] = _CPU
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()]
            homes = {self.of(t) for t in given if t.dim()}
            if func in (Tensor.__getitem__, Tensor.__setitem__):  # an index may be the CPU's
                homes = {self.of(args[0])} | (homes - {_CPU})
            if len(homes) > 1:
                raise RuntimeError(f"{func.__name__} of tensors on {sorted(map(str, homes))}")
            there = {t.untyped_storage().data_ptr() for t in given}
            out = func(*args, **kwargs)
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in there:
                    self._put(tensor, next(iter(homes), target))
            return out

    def _to(self, func: Any, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        """A copy in new memory where the device changes."""
        here = self.of(tensor)
        devices = [torch.device(a) for a in (*args, options.pop("device", None)) if isinstance(a, torch.device | str)]
        target = _CPU if func is Tensor.cpu else next(iter(devices), here)
        rest = [a for a in args if not isinstance(a, torch.device | str)]
        out = tensor.to(*rest, **options) if rest or options else tensor
        if target != here:
            out = out.clone() if out is tensor else out
            if _CPU not in (target, here):
                self.crossings.append(tuple(tensor.shape))
        if out is not tensor:
            self._put(out, target)
        return out

    def _put(self, tensor: Tensor, device: torch.device) -> None:
        self._where[tensor.untyped_storage().data_ptr()] = _FIRST if device == torch.device("cuda") else device
