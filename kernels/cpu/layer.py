"""A layer on one new token of each of a few rows: launches of `layer_loops` on tensors, in bfloat16 models.

`LayerWeights` holds the addresses of a layer's weights. `LayerStep` has the memory of a step and computes phases of it.
The functions below compute single phases for `workbench.kernels`, so that a layer in steps, between which hooks read
and change values, gives the same bits as one launch.

Cost: reads the weights of the layer and of the experts that are hit, and the keys and values in reach, once. A launch
costs about 30 microseconds.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int
from torch import Tensor

from workbench.kernels.cpu import threads
from workbench.kernels.cpu.layer_loops import compile_phases
from workbench.kernels.cpu.layer_records import BLOCK, COUNTER_BYTES, GIVEN, LAYER, STEP, VALUES, WEIGHTS, Phase
from workbench.kernels.cpu.products import scale_table
from workbench.kernels.cpu.vectors import LANES

__all__ = ["LayerSizes", "LayerStep", "LayerWeights", "Phase"]

_phases = functools.cache(compile_phases)
_ALIGNMENT = 64  # bytes


class LayerSizes(NamedTuple):
    """What a layer is apart from its weights; `window` is −1 without one."""

    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    window: int
    num_experts: int
    k: int
    d_mlp: int
    eps: float
    limit: float
    alpha: float

    @property
    def covered(self) -> bool:
        """Return whether the loops can compute a layer of this size."""
        outputs = (self.n_key_value_heads * self.d_head, self.d_head)
        return (
            all(n % LANES == 0 for n in outputs)
            and self.d_model % 32 == self.d_mlp % 32 == 0
            and self.n_heads * self.d_head % 32 == 0
            and self.num_experts >= 4
            and self.num_experts % 2 == 0
        )


class LayerWeights:
    """Hold the addresses of a layer's weights [...]. The tensors must stay where they are while this is used."""

    def __init__(self, sizes: LayerSizes, weights: Sequence[Tensor]) -> None:
        self.sizes = sizes
        addresses = [weight.data_ptr() for weight in weights]
        numbers = (sizes.eps, sizes.limit, sizes.alpha)
        self.record = np.array([(*sizes[:8], *addresses, scale_table().data_ptr(), *numbers)], LAYER)

    @staticmethod
    def covers(weights: Sequence[Tensor]) -> bool:
        """Return whether the loops can read these weights [...], in the order of `WEIGHTS`."""
        kinds = [torch.uint8 if name.endswith(("blocks", "scales")) else torch.bfloat16 for name in WEIGHTS]
        return all(
            weight.dtype == kind and weight.is_contiguous() and weight.device.type == "cpu"
            for weight, kind in zip(weights, kinds, strict=True)
        )


class _Value(NamedTuple):
    """Where a value of a step lies in its memory, and how to look at it."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(64)
def _layout(sizes: LayerSizes, rows: int) -> tuple[dict[str, _Value], np.ndarray, int]:
    """Return where each value is, the offsets as an array in the order of `VALUES`, and the bytes in all."""
    heads, kv, slots, keys = sizes.n_heads, sizes.n_key_value_heads, rows * sizes.k, sizes.n_key_value_heads
    width, model = sizes.d_head, (rows, sizes.d_model)
    shapes: dict[str, tuple[int, ...]] = {
        "scale": (rows, 1), "normalized": model, "queries": (rows, heads, width), "new_keys": (rows, keys, width),
        "new_values": (rows, keys, width), "scores": (rows, kv, heads // kv, BLOCK), "weighted": (rows, heads, width),
        "lse": (rows, heads), "sink": (rows, heads), "z": (rows, heads, width), "attention_out": model,
        "middle": model, "expert_input": model, "expert_groups": model, "logits": (rows, sizes.num_experts),
        "choice": (rows, sizes.k), "gates": (rows, sizes.k), "order": (slots,), "hit": (slots,), "ends": (slots,),
        "hits": (1,), "pairs": (rows, sizes.k, 2 * sizes.d_mlp), "post": (rows, sizes.k, sizes.d_mlp),
        "slot_out": (rows, sizes.k, sizes.d_model), "mlp_out": model, "result": model,
    }  # fmt: skip
    values, end = {}, 0
    for name in VALUES:
        dtype = torch.int64 if name in ("choice", "order", "hit", "ends", "hits") else torch.float32
        values[name] = _Value(end, shapes[name], dtype)
        end += -(-int(np.prod(shapes[name])) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return values, np.array([value.offset for value in values.values()], np.int64), end


class _Memory:
    """Memory of a step: its values, their addresses and what the step is given, and the counters of a launch."""

    def __init__(self, sizes: LayerSizes, rows: int) -> None:
        self.layout, offsets, size = _layout(sizes, rows)
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.addresses = np.zeros(len(VALUES) + len(GIVEN), np.int64)
        np.add(offsets, self.bytes.data_ptr(), out=self.addresses[: len(VALUES)])
        for name, number in (("rows", rows), ("rotates", 1)):
            self.addresses[_INDEX[name]] = number
        self.initial, self.step = self.addresses.copy(), self.addresses.view(STEP)
        self.counters = np.zeros(Phase.END * COUNTER_BYTES // 8, np.int64)
        self.counters_address = self.counters.ctypes.data
        self.views: dict[str, Tensor] = {}

    def view(self, name: str) -> Tensor:
        """Return a value [row ...]; made once."""
        if name not in self.views:
            at = self.layout[name]
            size = int(np.prod(at.shape)) * at.dtype.itemsize
            self.views[name] = self.bytes[at.offset : at.offset + size].view(at.dtype).view(at.shape)
        return self.views[name]


@functools.lru_cache(16)
def _unused(sizes: LayerSizes, rows: int) -> list[_Memory]:
    """Return memory that steps of this size have released: a layer uses what the one before it has used."""
    return []


class LayerStep:
    """The values of one step of a layer, and the phases that compute them.

    `run_to(phase)` computes what is missing before that phase. Between two calls, `value` shows a value in place.
    """

    def __init__(self, weights: LayerWeights, rows: int, begin: Phase = Phase.ATTENTION_NORM) -> None:
        self._weights, self._next = weights, int(begin)
        self._unused = _unused(weights.sizes, rows)
        try:
            self._memory = self._unused.pop()
            np.copyto(self._memory.addresses, self._memory.initial)
        except IndexError:
            self._memory = _Memory(weights.sizes, rows)
        self._tensors: list[Tensor] = []

    def release(self) -> None:
        """Let another step use this memory; neither this step nor its values can be used any more."""
        memory = self._memory
        del self._memory
        self._unused.append(memory)

    def give(self, **given: int) -> None:
        """Set what a step is given: names of `GIVEN` or, to use other memory for them, of `VALUES`."""
        for name, number in given.items():
            self._memory.addresses[_INDEX[name]] = number

    def give_tensors(self, **given: Tensor) -> None:
        """Set addresses to those of tensors [...], which are kept."""
        for name, tensor in given.items():
            self._memory.addresses[_INDEX[name]] = tensor.data_ptr()
            self._tensors.append(tensor)

    def give_cache(
        self,
        keys: BFloat16[Tensor, "row key kv d_head"],
        values: BFloat16[Tensor, "row key kv d_head"],
        columns: Int[Tensor, "row 1"],
    ) -> None:
        """Set the keys and values of a cache, which have equal strides, and where the new ones of each row belong."""
        self.give_tensors(keys=keys, values=values, columns=columns)
        self.give(row_bytes=2 * keys.stride(0), key_bytes=2 * keys.stride(1))

    def value(self, name: str) -> Tensor:
        """Return a value [row ...] in the step's memory."""
        return self._memory.view(name)

    def set(self, name: str, value: Tensor) -> None:
        """Replace a value [row ...]."""
        target = self._memory.view(name)
        target.copy_(value.view(target.shape))

    @property
    def next_phase(self) -> int:
        """Return the first phase that has not been computed."""
        return self._next

    def go_back(self, phase: int) -> None:
        """Let the next call compute from this phase on, also where it has been computed with other values."""
        self._next = min(self._next, int(phase))

    def run_to(self, end: int) -> None:
        """Compute the phases from where the last call ended to before `end`."""
        if self._next >= end:
            return
        first, self._next = self._next, int(end)
        memory = self._memory
        memory.counters.fill(0)
        small = first >= Phase.EXPERT_NORM and end <= Phase.GATE_UP  # waking a helper would take longer
        number = 1 if small else torch.get_num_threads()
        threads.run(_phases(), number, memory.counters_address, self._weights.record, memory.step, first, int(end))


_INDEX = {name: i for i, name in enumerate((*VALUES, *GIVEN))}


@functools.lru_cache(64)
def _without_weights(sizes: LayerSizes) -> LayerWeights:
    return LayerWeights(sizes, [torch.empty(0)] * len(WEIGHTS))


def _sizes(**given: float) -> LayerSizes:
    """Return sizes of which a phase needs these only."""
    return LayerSizes(**(dict.fromkeys(LayerSizes._fields, 0) | {"n_key_value_heads": 1} | given))  # type: ignore[arg-type]


def covers_attention(q: Tensor, k: Tensor) -> bool:
    """Return whether `attention` can compute with these queries [row 1 head d_head] and keys [row key kv d_head]."""
    return q.dtype == k.dtype == torch.bfloat16 and q.shape[-1] % LANES == 0


def attention(
    q: BFloat16[Tensor, "row 1 head d_head"],
    k: BFloat16[Tensor, "row key kv d_head"],
    v: BFloat16[Tensor, "row key kv d_head"],
    columns: Int[Tensor, "row 1"],
    window: int | None,
    sinks: BFloat16[Tensor, " head"] | None,
) -> tuple[BFloat16[Tensor, "row 1 head d_head"], Float32[Tensor, "row 1 head"], Float32[Tensor, "row 1 head"] | None]:
    """Return what `workbench.kernels.attention.attention` does, of one query a row; it reads keys in place."""
    rows, _, heads, width = q.shape
    if k.stride() != v.stride() or k.stride()[2:] != (width, 1):
        k, v = k.contiguous(), v.contiguous()
    sizes = _sizes(n_heads=heads, n_key_value_heads=k.shape[2], d_head=width, window=-1 if window is None else window)
    given = torch.zeros(heads, dtype=torch.bfloat16) if sinks is None else sinks.contiguous()
    weights = LayerWeights(sizes, [given if name == "sinks" else torch.empty(0) for name in WEIGHTS])
    step = LayerStep(weights, rows, Phase.ATTEND)
    step.give_tensors(queries=q.float().contiguous())
    step.give_cache(k, v, columns.contiguous())
    step.give(rotates=0)
    step.run_to(Phase.OUTPUT)
    lse, sink = (step.value(name)[:, None].clone() for name in ("lse", "sink"))
    z = step.value("weighted" if sinks is None else "z")[:, None].to(q.dtype)
    if sinks is None:
        return z, lse, None
    return z, torch.logaddexp(lse, sinks.float()), sink


def gate(
    logits: Float32[Tensor, "tokens expert"], experts: Int[Tensor, "tokens slot"]
) -> Float32[Tensor, "tokens slot"]:
    """Return the softmax over the logits of the chosen experts."""
    sizes = _sizes(num_experts=logits.shape[1], k=experts.shape[1])
    gates = torch.empty(experts.shape)
    step = LayerStep(_without_weights(sizes), len(logits), Phase.GATE)
    step.give_tensors(logits=logits.contiguous(), choice=experts.contiguous(), gates=gates)
    step.run_to(Phase.GROUP)
    return gates
