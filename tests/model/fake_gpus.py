"""A machine with several GPUs, simulated on the CPU: every tensor has a device, and operations on two are refused.

While a `Machine` is active, a call of torch on tensors of two devices is refused as a GPU would refuse it, and
`tensor.device` returns the simulated device. A device belongs to memory, so views and parameters share their tensor's.
Everything is computed on torch's path: `tensor.is_cuda` is still false.

A copy with `non_blocking=True` runs on the current stream of the source's device, and is carried out only once that
stream is synchronised: code that synchronises another stream reads old values, as on a real machine.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from workbench.kernels import mxfp4

_CPU, _FIRST = torch.device("cpu"), torch.device("cuda", 0)
_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


class Stream:
    """A stream of one device. It delays copies until it is synchronised, and logs what is done to it in `events`."""

    def __init__(self, device: torch.device | str | int = _FIRST, events: list[tuple[str, str]] | None = None) -> None:
        self.device = torch.device(device)
        self.events: list[tuple[str, str]] = [] if events is None else events
        self._pending: list[Callable[[], object]] = []
        self._waited_for: set[Stream] = set()

    def wait_stream(self, other: "Stream") -> None:
        """Order what follows on this stream after what `other` has."""
        self.events.append(("wait", str(self.device)))
        self._waited_for.add(other)

    def enqueue(self, copy: Callable[[], object], producer: "Stream") -> None:
        """Delay a copy. producer: the stream on which its source was computed, which must have been waited for."""
        assert self is producer or producer in self._waited_for, f"a copy on {self.device} did not wait for its source"
        self._waited_for.clear()
        self.events.append(("copy", str(self.device)))
        self._pending.append(copy)

    def synchronize(self) -> None:
        """Carry out everything that was delayed."""
        self.events.append(("synchronize", str(self.device)))
        for copy in self._pending:
            copy()
        self._pending.clear()


class Machine(TorchFunctionMode):
    """Devices named cuda:0, cuda:1 and so on.

    crossings: the shapes of what was copied from one GPU to another. events: what streams did, in order, each with its
    device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[int, ...]] = []
        self.events: list[tuple[str, str]] = []
        self._where: dict[int, torch.device] = {}
        self._default_streams: dict[torch.device, Stream] = {}
        self._current_streams: dict[torch.device, Stream] = {}

    def pretend(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        devices: int = 1,
        memory: int = 80 * 10**9,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        """Make torch.cuda describe such a machine, and use its streams."""
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: devices,
            "mem_get_info": lambda device: (memory, memory),
            "get_device_capability": lambda device: capability,
            "Stream": lambda device=_FIRST: Stream(device, self.events),
            "current_stream": self._current,
            "stream": self._use,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)  # it takes real streams only

    @property
    def devices(self) -> set[torch.device]:
        """The GPUs on which a tensor was ever put."""
        return {device for device in self._where.values() if device.type == "cuda"}

    def _current(self, device: torch.device) -> Stream:
        return self._current_streams.get(device) or self._default(device)

    def _default(self, device: torch.device) -> Stream:
        return self._default_streams.setdefault(device, Stream(device, self.events))

    @contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        before = self._current(stream.device)
        self._current_streams[stream.device] = stream
        try:
            yield
        finally:
            self._current_streams[stream.device] = before

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy between any two devices; on the current stream of a GPU that holds the source if it need not block."""
        device = self.of(source)
        if non_blocking and device != _CPU:
            self._current(device).enqueue(lambda: _without_mode(target.copy_, source), self._default(device))
            return target
        return target.copy_(source)

    def of(self, tensor: Tensor) -> torch.device:
        """The simulated device of a tensor."""
        if tensor.is_meta:
            return torch.device("meta")
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
            if func in (Tensor.numpy, Tensor.__array__) and self.of(args[0]) != _CPU:
                raise TypeError(f"can't convert {self.of(args[0])} device type tensor to numpy. Use Tensor.cpu() first")
            if func is Tensor.copy_:
                return self._copy(*args, **kwargs)
            kwargs.pop("pin_memory", None)
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
        if target.type == "meta":
            return torch.empty_like(tensor, device="meta")
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
        if tensor.is_meta:
            return
        self._where[tensor.untyped_storage().data_ptr()] = _FIRST if device == torch.device("cuda") else device


def _without_mode(copy: Callable[[Tensor], Tensor], source: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        copy(source)


def run_on_gpus(code: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Run blocks of code one after another in one namespace, on a machine with one GPU; return the machine.

    Their generations of 200 tokens are cut to 8: the simulation is slow, and devices do not depend on the length.
    """
    machine = Machine()
    machine.pretend(monkeypatch)
    mxfp4._table.cache_clear()
    namespace: dict[str, Any] = {"__name__": "__main__", "display": print}
    try:
        with machine:
            for block in code:
                exec(
                    compile(block.replace("max_new_tokens=200", "max_new_tokens=8"), "<documentation>", "exec"),
                    namespace,
                )
    finally:
        mxfp4._table.cache_clear()  # nothing of the machine outlives it
    return machine
