"""A step that is recorded and repeated generates what eager steps do, though nothing of the host is read again.

In place of a CUDA graph stands a recording of operations and launches with their tensors and numbers. Repeating it runs
them on the same memory, as a graph does: whatever the host computed while recording stays as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from tests.model.test_attention import packed_model
from workbench.kernels import attention as attend
from workbench.kernels import dispatch
from workbench.kernels.moe import Experts, swiglu
from workbench.kernels.mxfp4 import linear
from workbench.model import cache as cache_module
from workbench.model import decode_graph
from workbench.model.cache import KVCache
from workbench.model.decode_graph import DecodeGraph, DecodeStep, can_capture
from workbench.model.transformer import GptOss

RUN = InterpretedFunction.run


def attention(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, window: int | None, *, lengths: object, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without a value that the host reads, as the kernel has none."""
    assert lengths is None
    assert sinks is not None
    mask = attend.visible(position, torch.arange(k.shape[1]), window)
    weight, lse = attend.softmax(attend.scores(q, k, mask))
    sink = torch.sigmoid(sinks - lse)
    return attend.shrink(attend.combine(weight, v).to(q.dtype), sink), lse, sink


def moe(x: Tensor, experts: Tensor, gates: Tensor, weights: Experts, taps: object) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen."""
    total = torch.zeros_like(x)
    for e in range(weights.gate_up_bias.shape[0]):
        h = linear(x, weights.gate_up.at(e)) + weights.gate_up_bias[e]
        post = swiglu(h[:, 0::2], h[:, 1::2], weights.limit, weights.alpha)
        gate = torch.where(experts == e, gates, 0.0).sum(-1, keepdim=True)
        total = total + gate * (linear(post, weights.down.at(e)) + weights.down_bias[e])
    return total


WITHOUT_READS = {"attention": SimpleNamespace(attention=attention), "moe": SimpleNamespace(moe=moe)}


class Recording(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` is to kernels: `replay` repeats what ran while it was recording."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a recording cannot read a value"
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # views look at the same memory every time
            self.steps.append((func, args, kwargs or {}, out))
        return out

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        with _disable_current_modes():
            RUN(kernel, *args, **kwargs)
        self.steps.append((lambda *a, **k: RUN(kernel, *a, **k), args, kwargs, None))

    def finish(self) -> None:
        """A recording computes nothing: its results are not there before it is repeated."""
        for _, args, _, out in self.steps:
            if isinstance(out, Tensor) and out.is_floating_point() and not any(out is t for t in tree_leaves(args)):
                out.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.steps:
            new = func(*args, **kwargs)
            for old, again in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old is not again and "empty" not in str(func):
                    old.copy_(again)


class NoStream:
    def wait_stream(self, other: object) -> None:
        """Everything runs in order here."""


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of a GPU computed by torch: interpreted, a step takes seconds."""
    monkeypatch.setattr(dispatch, "triton", lambda name, x: WITHOUT_READS.get(name))


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """CPU tensors are a GPU's, and graphs are recordings."""
    made: list[Recording] = []
    active: list[Recording] = []

    def new() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextmanager
    def graph(recording: Recording, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads may use the GPU while a step is recorded"
        active.append(recording)
        with recording:
            yield
        active.pop()
        recording.finish()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        return active[-1].launch(self, args, kwargs) if active else RUN(self, *args, **kwargs)

    for name, value in {
        "CUDAGraph": new,
        "graph": graph,
        "Stream": lambda device: NoStream(),
        "current_stream": lambda device: NoStream(),
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    for name, value in (("ALIGNMENT", 8), ("BACK", 2), ("SLACK", 14)):  # windows of 5 hold 19 and move often
        monkeypatch.setattr(cache_module, name, value)
    return made


@pytest.fixture(scope="module")
def model() -> GptOss:
    return packed_model().float()


def logits_of(model: GptOss, steps: int, *, graphs: bool) -> list[Tensor]:
    """The logits of each step for two rows of unequal length, one of which leaves after half the steps."""
    model.cuda_graphs = graphs
    cache = KVCache(model.cfg, 2, 60, dtype=model.dtype, device=model.device)
    tokens = torch.randint(model.cfg.d_vocab, (2, 17 + steps), generator=torch.Generator().manual_seed(1))
    logits = []
    with torch.no_grad():
        model.residual(tokens[:, :17], cache=cache, n_real=[17, 15])
        step = DecodeStep(model, cache)
        for i in range(steps):
            if i == steps // 2:
                cache.select(torch.tensor([1]))
                tokens = tokens[1:]
            logits.append(step(tokens[:, 17 + i]).clone())
    assert cache.host_lengths == [15 + steps] == cache._length[model.device].tolist()
    assert any(held.bases[0] for held in cache._held.values()), "the windows should move"
    return logits


def check(model: GptOss, steps: int) -> None:
    for eager, recorded in zip(*(logits_of(model, steps, graphs=g) for g in (False, True)), strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("torch_kernels")
def test_recorded_steps_give_the_same_logits(model: GptOss, recordings: list[Recording]) -> None:
    check(model, 24)
    assert [recording.replays for recording in recordings] == [12, 12], "one recording for each number of rows"


@pytest.mark.usefixtures("torch_kernels")
def test_a_step_is_recorded_anew_when_its_positions_are_full(
    model: GptOss, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graph, "_FEWEST_POSITIONS", 20)
    monkeypatch.setattr(decode_graph, "_FEWEST_STEPS", 4)
    assert [decode_graph.positions_for(n, 60) for n in (1, 16, 17, 40)] == [20, 20, 40, 60]
    check(model, 30)
    # Rows of 17 positions have 40 for 15 steps, when one leaves; the other has 30 and continues with 40, then 60.
    assert [recording.replays for recording in recordings] == [15, 10, 5]

    class Endless(DecodeGraph):
        """Negative control: a recording that is never made anew."""

        def __init__(self, model: GptOss, cache: KVCache) -> None:
            super().__init__(model, cache)
            self.end = 1000

    monkeypatch.setattr(decode_graph, "DecodeGraph", Endless)
    with pytest.raises(AssertionError, match="not close"):
        check(model, 30)


@pytest.mark.long
def test_recorded_steps_of_triton_s_kernels_give_the_same_logits(model: GptOss, recordings: list[Recording]) -> None:
    check(model, 6)


@pytest.mark.usefixtures("torch_kernels")
def test_a_step_that_reads_lengths_on_the_host_fails(
    model: GptOss, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: positions that are computed from the host's numbers stay as they were recorded."""

    def from_host(self: KVCache, new: int) -> Tensor:
        return torch.tensor([[n + i for i in range(new)] for n in self.host_lengths])

    monkeypatch.setattr(KVCache, "next_positions", from_host)
    with pytest.raises(AssertionError, match="not close"):
        check(model, 8)


class FilledShapes(KVCache):
    """Negative control: attention to the slots that were filled when the step was recorded."""

    fixed_end = property(lambda self: None, lambda self, value: None)  # type: ignore[assignment]


@pytest.mark.usefixtures("torch_kernels")
def test_a_step_whose_shapes_follow_the_lengths_fails(
    model: GptOss, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "KVCache", FilledShapes)
    with pytest.raises(AssertionError, match="not close"):
        check(model, 24)


def test_only_plain_steps_on_one_gpu_are_recorded(model: GptOss, recordings: list[Recording]) -> None:
    assert packed_model().cuda_graphs, "on: an H100 has shown that they are right"
    model.cuda_graphs = False
    assert not can_capture(model)
    model.cuda_graphs = True
    assert can_capture(model)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda t, hook: None)]):
        assert not can_capture(model)
    model.cuda_graphs = False
