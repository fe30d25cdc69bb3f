"""A step of generation, eager or as a CUDA graph: recorded once for a number of rows, then started by one call.

A graph repeats its kernels on the same memory with the same sizes. So a step that is recorded attends to more positions
of the cache than are filled, and reads lengths and tokens on the device; it is recorded anew when these are full. What
depends on the lengths in other ways, moving the windows of the cache, happens between two steps.

Graphs are on for NVIDIA GPUs: on an H100 they give the same tokens as eager steps, whose kernels take a tenth of the
time that Python needs to launch them. The step `graphs` of `workbench bench gpu --first` compares both; on AMD GPUs
they have not run and are off. `model.cuda_graphs` switches them.

Reference: "CUDA Graphs" in the PyTorch documentation, pytorch.org/docs/stable/notes/cuda.html.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels import dispatch
from workbench.model.cache import KVCache

_FEWEST_POSITIONS = 1024  # a recorded step attends to at least as many
_FEWEST_STEPS = 256  # that a recording serves before the next one


class DecodeStep:
    """Return the logits after one more token of every row of the cache."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._graph: DecodeGraph | None = None

    def __call__(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row d_vocab"]:
        if not can_capture(self._model):
            self._graph = self._cache.fixed_end = None
            return _logits(self._model, self._cache, tokens[:, None])
        graph, filled = self._graph, max(self._cache.host_lengths) + 1
        if graph is None or graph.rows != len(tokens) or graph.end < filled:  # rows that end leave, and memory moves
            graph = self._graph = DecodeGraph(self._model, self._cache)
        return graph.step(tokens)


class DecodeGraph:
    """One recorded step. The logits it returns are overwritten by the next step."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        lengths = cache.host_lengths
        self.rows, self.end, self._cache = len(lengths), positions_for(max(lengths), cache.capacity), cache
        self._tokens = torch.zeros(self.rows, 1, dtype=torch.long, device=model.device)
        cache.fixed_end = self.end
        stream = torch.cuda.Stream(model.device)  # a first step compiles kernels, which a recording cannot
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            _logits(model, cache, self._tokens)
        torch.cuda.current_stream(model.device).wait_stream(stream)
        cache.truncate(lengths)  # what the first step and the recording wrote is overwritten by the next one
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            self._logits = _logits(model, cache, self._tokens)
        cache.truncate(lengths)

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row d_vocab"]:
        """Return the logits after these tokens, which are added to the cache."""
        self._cache.make_room(1)
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        self._cache.count([1] * self.rows)
        return self._logits


def positions_for(filled: int, capacity: int) -> int:
    """Return how many positions a recorded step attends to: room for some hundred steps beyond `filled`."""
    end = _FEWEST_POSITIONS
    while end < filled + _FEWEST_STEPS:
        end *= 2
    return min(end, capacity)


def can_capture(model: Any) -> bool:
    """Return whether steps are recorded: switched on, on one GPU, with packed experts, and nothing hooked."""
    return (
        model.cuda_graphs
        and dispatch.on_gpu(model.embed.weight)
        and len({model.device, *model.devices}) == 1
        and all(m.lora is None and m.packed for b in model.blocks for m in (b.mlp.experts.gate_up, b.mlp.experts.down))
        and not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    )


def _logits(model: Any, cache: KVCache, tokens: Int[Tensor, "row 1"]) -> Float[Tensor, "row d_vocab"]:
    logits: Tensor = model.unembed(model.ln_final(model.residual(tokens, cache=cache)))[:, 0]
    return logits
