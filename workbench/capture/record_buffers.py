"""The arrays of one unit, filled by hooks while the model runs, pass after pass.

They are allocated once and reused, so that the memory of a job does not depend on its length. For a model on GPUs they
are pinned, and each GPU copies its records on a stream of its own while it computes the next layers: a copy runs on a
stream of the GPU that holds the activation, whichever GPU is current. Reductions happen on the activation's device, as
one product with a matrix of weights: a sum of products gives the same bits every time, an atomic sum does not.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.errors import JobError
from workbench.harmony.labels import CHANNELS
from workbench.hooks.names import BLOCK
from workbench.kernels.moments import moments
from workbench.model.config import Config
from workbench.runs.schema import Activation, Record, Spec

_OWN = {
    "experts": "mlp.hook_expert_indices",
    "gates": "mlp.hook_expert_weights",
    "router_logits": "mlp.router.hook_out",
    "sink": "attn.hook_sink",
}


class Buffers:
    """The arrays of a unit of up to `capacity` tokens.

    `start` begins a unit, `begin` selects the tokens of the next pass, and `take` returns the arrays.
    """

    def __init__(self, spec: Spec, cfg: Config, capacity: int, *, pinned: bool) -> None:
        self._points: dict[str, list[tuple[str, int, Activation | Record | None]]] = defaultdict(list)
        self._arrays: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._pinned = pinned
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        wide = torch.uint8 if cfg.num_experts <= 256 else torch.uint16
        shapes = {
            "experts": (cfg.experts_per_token, wide),
            "gates": (cfg.experts_per_token, torch.float16),
            "router_logits": (cfg.num_experts, torch.float16),
            "sink": (cfg.n_heads, torch.float16),
        }
        sinks = spec.sinks or spec.sink_sums
        on = {"experts": spec.routing, "gates": spec.routing, "router_logits": spec.router_logits, "sink": sinks}
        for name, (d, dtype) in shapes.items():
            if on[name]:
                self._arrays[name] = torch.zeros((cfg.n_layers, capacity, d), dtype=dtype, pin_memory=pinned)
                for layer in range(cfg.n_layers):
                    self._points[f"blocks.{layer}.{_OWN[name]}"].append((name, layer, None))
        for a in spec.selected:
            kind, stored = ("activations", "bfloat16") if isinstance(a, Activation) else ("records", a.dtype)
            name = f"{kind}/{a.name}"
            if a.per_token:
                shape = (len(a.layers), capacity, a.d)
                self._arrays[name] = torch.zeros(shape, dtype=getattr(torch, stored), pin_memory=pinned)
            for place, layer in enumerate(a.layers):
                self._points[f"blocks.{layer}.{a.hook}"].append((name, place, a))
        self._shapes = {f"records/{r.name}": r.shape for r in spec.records}
        self._spec, self._used, self._at = spec, 0, slice(0, 0)
        self._members: Mapping[str, Bool[np.ndarray, " token"]] = {}
        self._weights: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def fwd_hooks(self) -> list[tuple[str, Any]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)`."""
        return [(name, self._record) for name in self._points]

    def start(
        self,
        sequence: Int[np.ndarray, " token"],
        channel: Int[np.ndarray, " token"],
        message: Int[np.ndarray, " token"],
        members: Mapping[str, Bool[np.ndarray, " token"]],
    ) -> None:
        """A unit of these tokens begins; members: of sparse activations, which tokens are recorded."""
        self._used, self._at, self._members = len(sequence), slice(0, 0), members
        _, self._row = np.unique(sequence, return_inverse=True)
        self._cell = self._row * len(CHANNELS) + channel
        self._message = np.where(message < 0, -1, self._row * (int(message.max(initial=0)) + 2) + message)
        self._sums = {}

    def begin(self, n: int) -> None:
        """The next pass runs the next n tokens."""
        self._at, self._weights = slice(self._at.stop, self._at.stop + n), {}

    def take(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the records [layer token ...] (valid until the next `start`) and their sums [layer cell ...]."""
        for stream in self._streams.values():
            stream.synchronize()
        assert self._at.stop == self._used, f"{self._at.stop} of {self._used} tokens were run"
        records = {}
        for name, array in self._arrays.items():
            used = array[:, : self._used]
            values = (used.view(torch.uint16) if used.dtype == torch.bfloat16 else used).numpy()
            shape = self._shapes.get(name)
            records[name] = values if shape is None else values.reshape(*values.shape[:2], *shape)
        sums: dict[str, np.ndarray] = {}
        for a in self._spec.selected:
            if a.sparse:
                records[f"selected/{a.name}"] = self._rows_of(a, slice(0, self._used))
            if not a.per_token:
                sums |= self._moments(a)
        return records, sums

    def _moments(self, a: Activation | Record) -> dict[str, np.ndarray]:
        n_cells = len(CHANNELS) * (int(self._row.max()) + 1)
        tokens = np.bincount(self._cell[self._members[a.name]], minlength=n_cells).astype(np.uint32)
        moments = {f"{a.name}_tokens": tokens.reshape(-1, len(CHANNELS))}
        shape = (a.d,) if isinstance(a, Activation) else a.shape
        for what in _summed(a):
            total = self._sums[f"{a.name}_{what}"].float().numpy()
            if what != "sketch":
                total = total.reshape(-1, len(CHANNELS), len(a.layers), *shape)
            moments[f"{a.name}_{what}"] = total
        return moments

    def _record(self, activation: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        for name, place, a in self._points[hook.name]:
            self._record_one(activation, name, place, a)

    def _record_one(self, activation: Tensor, name: str, place: int, a: Activation | Record | None) -> None:
        x = values_of(a, activation.detach(), self._spec.functions)
        if a is not None and not a.per_token:
            self._add(a, place, x.float())
            return
        if isinstance(a, Activation) and a.reduce == "message":
            means = self._weight(a, x.device) @ x.float()
            x = torch.zeros((len(x), a.d), dtype=means.dtype, device=x.device)
            x[torch.from_numpy(self._rows_of(a, self._at)).to(x.device)] = means
        elif a is not None and a.sparse:
            rows = torch.from_numpy(self._rows_of(a, self._at)).to(x.device)[:, None]
            x = torch.where(rows, x, torch.zeros((), dtype=x.dtype, device=x.device))
        target = self._arrays[name][place, self._at]
        if name == "router_logits" and x.shape[-1] < target.shape[-1]:  # a layer with fewer experts than another
            target[:, x.shape[-1] :] = torch.nan
            target = target[:, : x.shape[-1]]
        if not self._pinned:
            target.copy_(x)
            return
        x = x.to(target.dtype)
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            target.copy_(x, non_blocking=True)
            x.record_stream(stream)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream on which this device copies its records.

        A copy to the host runs on the source device's current stream, so a stream of another device orders nothing.
        """
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _rows_of(self, a: Activation | Record, at: slice) -> Bool[np.ndarray, " token"]:
        """Return tokens with a row of their own: the selected ones, or the last one of each message that has any."""
        members = self._members[a.name][at]
        if a.reduce != "message":
            return members
        message = np.where(members, self._message[at], -1)
        in_message = np.flatnonzero(message >= 0)
        last = np.zeros(len(members), dtype=bool)
        if len(in_message):  # the tokens of a message are neighbours, and a pass has whole sequences
            last[in_message[np.append(message[in_message][1:] != message[in_message][:-1], True)]] = True
        return last

    def _weight(self, a: Activation, device: torch.device) -> Float[Tensor, "message token"]:
        """Return the weights of each message's mean over the tokens of this pass."""
        if (a.name, device) not in self._weights:
            message = np.where(self._members[a.name][self._at], self._message[self._at], -1)
            weight = message[self._rows_of(a, self._at), None] == message
            weight = weight / weight.sum(1, keepdims=True)
            self._weights[a.name, device] = torch.from_numpy(weight.astype(np.float32)).to(device)
        return self._weights[a.name, device]

    def _add(self, a: Activation | Record, place: int, x: Float[Tensor, "token d"]) -> None:
        """Add sums and squares by cell, and the sketch by channel, in float64 over passes."""
        cells = np.where(self._members[a.name][self._at], self._cell[self._at], -1)
        labels = torch.from_numpy(cells).to(x.device)
        of_cells = moments(x, labels, len(CHANNELS) * (int(self._row.max()) + 1))
        parts = {"sum": of_cells.sums, "sumsq": of_cells.squares}
        if isinstance(a, Activation) and a.sketch:
            channel = torch.arange(len(CHANNELS), device=x.device)[:, None]
            by_channel = ((labels % len(CHANNELS) == channel) & (labels >= 0)).to(x.dtype)
            parts["sketch"] = torch.einsum("ct,td,tr->cdr", by_channel, x, x @ sketch_matrix(a).to(x.device))
        for what in _summed(a):
            part, name = parts[what], f"{a.name}_{what}"
            if name not in self._sums:
                self._sums[name] = torch.zeros((part.shape[0], len(a.layers), *part.shape[1:]), dtype=torch.float64)
            self._sums[name][:, place] += part.double().cpu()


def _summed(a: Activation | Record) -> tuple[str, ...]:
    """Return the sums of a record that stores no values of single tokens."""
    if a.reduce == "mean":
        return ("sum",)
    return ("sum", "sumsq", "sketch") if isinstance(a, Activation) and a.sketch else ("sum", "sumsq")


def values_of(
    a: Activation | Record | None, activation: Tensor, functions: Mapping[str, Callable[[Any], Any]]
) -> Float[Tensor, "token d"]:
    """Return the values that each token of a pass has of a record of activations [1 pos ...], its axes in a row.

    Raises:
        JobError: a user's function returns another shape than it did when it was tried.
    """
    axes = BLOCK[a.hook].split()[1:] if a is not None else []
    if a is not None and a.index:
        # the axis of an activation is the first after pos; [batch head query key] has its heads before
        axis = axes.index(a.index_dim) + 1 if isinstance(a, Record) else 2
        activation = activation.index_select(axis, torch.tensor(a.index, device=activation.device))
    if not isinstance(a, Record) or a.reduce not in ("norm", "own"):
        return activation.flatten(0, 1).flatten(1)
    n = activation.shape[axes.index("pos" if "pos" in axes else "query_pos") + 1]
    x = functions[a.name](activation) if a.reduce == "own" else activation.float().norm(dim=-1)
    if tuple(x.shape) != (1, n, *a.shape):
        raise JobError(
            f"recorder {a.name!r}: its function returns {tuple(x.shape)} of activations {tuple(activation.shape)}, "
            "expected "
            f"{(1, n, *a.shape)}: it has to return the same dimensions for any number of tokens"
        )
    return x.detach().reshape(n, a.d)


def pinned_bytes(size: int) -> int:
    """Return the bytes that PyTorch's allocator of pinned memory takes for a tensor: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def sketch_matrix(a: Activation) -> Float[Tensor, "d sketch"]:
    """Return Ω of a sketch: normal, the same for every run, from the sizes alone."""
    rng = np.random.default_rng([a.d, a.sketch])
    return torch.from_numpy(rng.normal(0, a.sketch**-0.5, (a.d, a.sketch)).astype(np.float32))
