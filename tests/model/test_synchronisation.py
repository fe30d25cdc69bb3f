"""A pass neither waits for the GPU nor copies from the host, and launches few kernels.

Meta tensors stand for those of a GPU: they have no values, so whatever reads one is noticed, and tensors of the host
are distinguished. Operations of torch are counted as they are dispatched, launches of Triton's kernels where the
launchers start them; kernels are not run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from workbench.kernels import dispatch
from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.attention_blocks import sequence_starts
from workbench.model.cache import KVCache
from workbench.model.config import PUBLISHED
from workbench.model.transformer import GptOss

GPU = torch.device("meta")
MOST_LAUNCHES = 25  # of a decode step, a layer
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
NO_KERNEL = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}


@dataclass
class Trace:
    """What a pass did: waits for the GPU, copies from the host, and launches by name."""

    waits: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """Sorts operations into waits, uploads and launches. A value that is read from the GPU is zero."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu, on_host = any(t.device == GPU for t in inputs), any(t.device != GPU for t in inputs)
        name = func.overloadpacket.__name__
        if func in READS and on_gpu:
            self.trace.waits.append(name)
            if func is not aten._local_scalar_dense.default:
                raise AssertionError(f"the pass reads values: {name}")
            return 0
        if func is aten._to_copy.default and on_gpu and kwargs.get("device", GPU) != GPU:
            self.trace.waits.append(f"copy of {tuple(inputs[0].shape)} to the host")
            return torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
        if on_host and (kwargs.get("device") == GPU or (func is aten.copy_.default and args[0].device == GPU)):
            self.trace.uploads.append(f"{name} of {tuple(inputs[-1].shape)}")
        elif on_gpu and on_host:
            assert all(t.dim() == 0 for t in inputs if t.device != GPU), f"{name} mixes tensors of the host and the GPU"
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(t.device == GPU for t in made) and not func.is_view and name not in NO_KERNEL:
            self.trace.launches[name] += 1
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    trace = Trace()

    def launch(self: InterpretedFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for arg in (*args, *kwargs.values()):
            assert not isinstance(arg, Tensor) or arg.device == GPU, f"{self.__name__} gets a tensor of the host"
        trace.launches[self.__name__] += 1

    def constructor(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A constructor from values of the host, which dispatches nothing for a meta tensor."""

        def construct(*args: Any, **kwargs: Any) -> Tensor:
            if torch.device(kwargs.get("device") or "cpu") == GPU:
                trace.uploads.append("new tensor")
            return own(*args, **kwargs)

        return construct

    sequence_starts.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", constructor(torch.tensor))
        patch.setattr(torch, "as_tensor", constructor(torch.as_tensor))
        patch.setattr(dispatch, "on_gpu", lambda x: x.device == GPU)
        patch.setattr(tiles, "target", lambda x: "sm_90")
        patch.setattr(tiles, "splits", lambda programs, device: 4)
        patch.setattr(InterpretedFunction, "run", launch)
        with Watch(trace), torch.no_grad():
            yield trace
    sequence_starts.cache_clear()


def model_of(layers: int) -> GptOss:
    cfg = replace(PUBLISHED["20b"], n_layers=layers, windows=PUBLISHED["20b"].windows[:layers], d_vocab=512)
    with GPU:
        model = GptOss(cfg, packed=True).to(torch.bfloat16)
    return model.requires_grad_(False).eval()


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=GPU)


Pass = Callable[[GptOss, pytest.MonkeyPatch], Trace]


def decode(rows: int, past: int, new: int = 1) -> Pass:
    def run(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> Trace:
        cache = KVCache(model.cfg, rows, past + 8, dtype=torch.bfloat16, device=GPU)
        cache.advance(past)
        with watched(monkeypatch):  # what a first pass copies once
            model.residual(ids(rows, new), cache=cache)
        with watched(monkeypatch) as trace:
            model.unembed(model.ln_final(model.residual(ids(rows, new), cache=cache)))
        return trace

    return run


def prefill(tokens: int, lengths: list[int] | None = None, rows: int = 1) -> Pass:
    def run(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> Trace:
        model._frequencies()
        with watched(monkeypatch) as trace:
            model.residual(ids(rows, tokens), packed=lengths)
        return trace

    return run


def prompt(tokens: int, rows: int = 2) -> Pass:
    def run(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> Trace:
        model._frequencies()
        cache = KVCache(model.cfg, rows, tokens + 8, dtype=torch.bfloat16, device=GPU)
        with watched(monkeypatch) as trace:
            model.residual(ids(rows, tokens), cache=cache)
        return trace

    return run


WITHOUT_COPIES = {
    "decode": decode(1, 500),
    "decode of 64 rows": decode(64, 300),
    "decode of two tokens": decode(3, 17, new=2),
    "decode that moves windows": decode(2, 319),
    "prefill": prefill(1030),
    "prompts into a cache": prompt(700),
}


@pytest.mark.parametrize("name", WITHOUT_COPIES)
def test_a_pass_neither_waits_nor_copies_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = WITHOUT_COPIES[name](model_of(2), monkeypatch)
    assert trace.waits == []
    assert trace.uploads == []
    assert trace.launches["_forward"] + trace.launches["_split"] == 2, "both layers should run on Triton's kernels"


def test_packed_sequences_are_described_in_two_copies_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [100, 3, 60, 0, 1]
    traces = [prefill(164, lengths)(model_of(layers), monkeypatch) for layers in (1, 3)]
    for trace in traces:
        assert trace.waits == []
        assert len(trace.uploads) == 2, "positions and starts, whatever the number of layers"


def a_layer(run: Pass, monkeypatch: pytest.MonkeyPatch) -> float:
    """Launches of two layers more, one of each window, halved: without what a pass does once."""
    few, many = (sum(run(model_of(layers), monkeypatch).launches.values()) for layers in (2, 4))
    return (many - few) / 2


@pytest.mark.parametrize("rows", [1, 64])
def test_launches_of_a_decode_step(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_layer(decode(rows, 300), monkeypatch) <= MOST_LAUNCHES


def test_launches_of_a_prefill_do_not_depend_on_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [a_layer(prefill(n), monkeypatch) for n in (100, 1030, 8192)]
    assert counts[0] == counts[1] == counts[2] <= MOST_LAUNCHES
    packed = [a_layer(prefill(164, lengths), monkeypatch) for lengths in ([164], [100, 3, 60, 0, 1])]
    assert packed == counts[:1] * 2


SPOILED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t[0, 0, 0].item(),
    "int": lambda t: int(t.argmax()),
    "bool": lambda t: bool((t > 0).any()),
    "tolist": lambda t: t[0, 0].tolist(),
    "cpu": lambda t: t.cpu(),
    "upload": lambda t: torch.tensor([1.0, 2.0]).to(t.device),
    "new tensor": lambda t: torch.tensor([1.0, 2.0], device=t.device),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_hook_that_waits_or_copies_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(2)

    def spoil(t: Tensor, hook: object) -> None:
        SPOILED[name](t)

    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", spoil)]):
        trace = decode(1, 20)(model, monkeypatch)
    assert len(trace.waits) + len(trace.uploads) == 1, name


def test_launches_that_grow_with_the_length_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an operation for every 1,024 positions, as chunks on a CPU need it."""

    def chunks(t: Tensor, hook: object) -> Tensor:
        return torch.cat([part * 1 for part in t.split(1024, 1)], 1)

    def run(tokens: int) -> Pass:
        def hooked(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> Trace:
            points = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers)]
            with model.hooks(fwd_hooks=[(point, chunks) for point in points]):
                return prefill(tokens)(model, monkeypatch)

        return hooked

    assert a_layer(run(8192), monkeypatch) > a_layer(run(100), monkeypatch)
    assert a_layer(run(8192), monkeypatch) > a_layer(prefill(8192), monkeypatch)
