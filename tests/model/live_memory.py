"""The bytes of tensors that are alive, counted while a model runs: what an allocator would be asked for."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
UNINITIALIZED = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty}


class LiveBytes(TorchDispatchMode):
    """Counts the storages made while it is on, until they are freed; views and what was there before are nobody's.

    zeroed: fill memory that would not be initialized with zeros, for launchers whose kernels do not run.
    """

    def __init__(self, there: Iterable[Tensor] = (), *, zeroed: bool = False) -> None:
        super().__init__()
        self._zeroed = zeroed
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __enter__(self) -> Any:
        gc.freeze()  # collecting is cheap where only what is made from here on is looked at
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if self._zeroed and func.overloadpacket in UNINITIALIZED:
            out.zero_()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), given)
        return out

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given or not size:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)
        if self.live > self.peak:
            gc.collect()  # the interpreter's own frames are circles that hold on to what a kernel was given
            self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
