"""A Triton driver that compiles every launch for a GPU that is not there, and executes nothing.

The real launchers run on CPU tensors, so each kernel is compiled with the specialisation that a card would get: which
arguments are divisible by 16, which are 1, and all constants. Run it as a program in a process of its own, because
Triton decides at import whether it interprets:

    python -m tests.kernels.gpu.pretend_driver sm_90 decode "prefill of 100 tokens"

prints one JSON object: scenario → kernels in the order of their launches, and the resources of each compiled kernel.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from workbench.kernels import dispatch
from workbench.kernels.gpu import aot, tiles
from workbench.kernels.gpu.aot import TARGETS, Target
from workbench.model.cache import KVCache
from workbench.model.config import PUBLISHED, Config
from workbench.model.transformer import GptOss

PROCESSORS = 132


class PretendDriver:
    """What Triton's runtime asks of a driver. `launches` collects the names of launched kernels."""

    def __init__(self, target: Target) -> None:
        self.target, self.launches = target, list[str]()
        driver = self

        class Launcher:
            def __init__(self, _source: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, *_: Any) -> None:
                driver.launches.append(self.name)

        self.launcher_cls = Launcher
        self.utils = self

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads: not read by what is tested

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared,
            "multiprocessor_count": PROCESSORS,
            "warpSize": self.target.warp,
            "max_num_regs": self.target.registers,
        }

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def pretending(name: str) -> Iterator[tuple[PretendDriver, dict[str, list[Any]]]]:
    """Launch on a pretended GPU. Yields the driver and kernel name → its compiled kernels."""
    driver, compiled = PretendDriver(TARGETS[name]), dict[str, list[Any]]()
    jit = triton.runtime.jit.JITFunction
    compile_own, on_gpu, target, splits = jit._do_compile, dispatch.on_gpu, tiles.target, tiles.splits
    empty, new_empty = torch.empty, Tensor.new_empty

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = compile_own(self, *args, **kwargs)
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    triton.runtime.driver.set_active(driver)
    jit._do_compile = remember
    dispatch.on_gpu = lambda x: True
    tiles.target = lambda x: name
    tiles.splits = lambda programs, device: min(64, 1 << max(1, 2 * PROCESSORS // max(1, programs)).bit_length() - 1)
    # Kernels write nothing here. Zeros keep the torch operations between them within their ranges.
    torch.empty = torch.zeros
    Tensor.new_empty = lambda self, *size, **options: self.new_zeros(*size, **options)  # type: ignore[method-assign]
    try:
        yield driver, compiled
    finally:
        jit._do_compile, dispatch.on_gpu, tiles.target, tiles.splits = compile_own, on_gpu, target, splits
        torch.empty, Tensor.new_empty = empty, new_empty  # type: ignore[method-assign]


def model_of(name: str, layers: int = 2) -> tuple[Config, GptOss]:
    """Return layers of a published model with zeros as weights, which take no memory before they are read."""
    cfg = replace(PUBLISHED[name], n_layers=layers, windows=PUBLISHED[name].windows[:layers], d_vocab=512)
    with torch.device("meta"):
        model = GptOss(cfg, packed=True)

    def zeros(t: Tensor) -> Tensor:
        return torch.zeros(t.shape, dtype=t.dtype if t.dtype == torch.uint8 else torch.bfloat16)

    model.load_state_dict({k: zeros(t) for k, t in model.state_dict().items()}, assign=True)
    return cfg, model.requires_grad_(False).eval()


def prefill(n: int, lengths: list[int] | None = None) -> Callable[[Config, GptOss], None]:
    def run(_: Config, model: GptOss) -> None:
        with torch.no_grad():
            model.residual(torch.zeros(1, n, dtype=torch.long), packed=lengths)

    return run


def decode(batch: int, past: int, new: int = 1) -> Callable[[Config, GptOss], None]:
    def run(cfg: Config, model: GptOss) -> None:
        cache = KVCache(cfg, batch, past + new, dtype=torch.bfloat16, device=torch.device("cpu"))
        cache.advance(past)
        with torch.no_grad():
            model.residual(torch.zeros(batch, new, dtype=torch.long), cache=cache)

    return run


def hooked(n: int) -> Callable[[Config, GptOss], None]:
    points = ("attn.hook_sink", "mlp.experts.hook_gate", "mlp.experts.hook_post", "mlp.experts.hook_out")

    def run(_: Config, model: GptOss) -> None:
        hooks = [(f"blocks.0.{point}", lambda t, hook: t * 0.5) for point in points]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model.residual(torch.zeros(1, n, dtype=torch.long))

    return run


def backward(n: int) -> Callable[[Config, GptOss], None]:
    def run(_: Config, model: GptOss) -> None:
        leaf = [("hook_embed", lambda t, hook: t.detach().requires_grad_())]
        with model.hooks(fwd_hooks=leaf):
            model.residual(torch.zeros(1, n, dtype=torch.long)).float().sum().backward()

    return run


SCENARIOS: dict[str, Callable[[Config, GptOss], None]] = {
    "prefill of 1 token": prefill(1),
    "prefill of 100 tokens": prefill(100),
    "prefill of 1,030 tokens": prefill(1030),
    "prefill of 2,060 tokens": prefill(2060),
    "packed sequences": prefill(164, [100, 3, 60, 0, 1]),
    "decode": decode(1, 500),
    "decode of 64 sequences": decode(64, 300),
    "decode of two tokens": decode(3, 17, new=2),
    "hooked": hooked(50),
    "backward": backward(100),
}


def measure(target: str, scenarios: list[str], published: str = "20b") -> dict[str, Any]:
    """Return the launches of each scenario, and the resources of each compiled kernel."""
    cfg, model = model_of(published)
    with pretending(target) as (driver, compiled):
        launches = {}
        for name in scenarios:
            begun = len(driver.launches)
            SCENARIOS[name](cfg, model)
            launches[name] = driver.launches[begun:]
    kernels = [
        {"kernel": name, **aot.resources_of(kernel, TARGETS[target])._asdict()}
        for name, variants in compiled.items()
        for kernel in variants
    ]
    return {"launches": launches, "kernels": kernels, "layers": cfg.n_layers}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "run this without TRITON_INTERPRET: it compiles"
    print(json.dumps(measure(sys.argv[1], sys.argv[2:] or list(SCENARIOS))))
