"""Schema 3 of a run: what is in it, in which shapes, and the grain in which it is written.

A run is a Zarr v3 group. Token rows are laid out in *units*: a unit consists of complete shards that no other unit writes, so
units can be written in any order by anybody, and each is committed by one flag after everything else of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from workbench.harmony.labels import CHANNELS

SCHEMA = 3  # 1 had every token of an activation, 2 no manifests; runs of both are read as they are
MANIFESTS = 3  # the first schema that has them
CHUNK = 1024  # token rows of an inner chunk


@dataclass(frozen=True)
class Unit:
    """The grain of work, of files and of commit: token rows [start, start + capacity) and the sequences in them."""

    index: int
    start: int
    capacity: int
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where every sequence's tokens go. Units follow each other, and so do the sequences within and across them."""

    unit_tokens: int
    units: tuple[Unit, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Token rows, gaps included."""
        return self.units[-1].start + self.units[-1].capacity

    @property
    def unit_sequences(self) -> int:
        """Summary rows of a unit: as many as the fullest unit has sequences."""
        return max(len(unit.sequences) for unit in self.units)


@dataclass(frozen=True)
class Activation:
    """A hook point inside the blocks, the layers it is recorded in, and the values a token has there.

    index: which of the axis behind pos (heads, experts), all if empty. tokens: arguments of `harmony.token_set`, every
    token if empty. reduce: "raw"; "message", the mean of each message's tokens at its last one; or "moments", only
    sums and squares by sequence and channel, with a sketch of so many directions of their second moments.
    """

    hook: str
    layers: tuple[int, ...]
    d: int
    index: tuple[int, ...] = ()
    tokens: Mapping[str, Any] = field(default_factory=dict)
    reduce: str = "raw"
    sketch: int = 0

    @property
    def sparse(self) -> bool:
        """Whether some tokens have no row of their own."""
        return bool(self.tokens) or self.reduce != "raw"


@dataclass(frozen=True)
class Spec:
    """What a capture records.

    sink_sums: of the sinks only the sums by sequence and channel. host_routing: the experts are those that a host chose;
    the router's own choices, the margin between its k-th and (k+1)-th logit, and which tokens were forced are beside.
    """

    routing: bool
    router_logits: bool
    sinks: bool
    logprobs: bool
    activations: tuple[Activation, ...] = ()
    sink_sums: bool = False
    host_routing: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        lists = [{"layers": list(a.layers), "index": list(a.index)} for a in self.activations]
        points = [asdict(a) | plain for a, plain in zip(self.activations, lists, strict=True)]
        values = asdict(self) | {"activations": points}
        if not self.host_routing:  # runs that were begun before there was this field can be resumed
            del values["host_routing"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_json`."""
        points = tuple(
            Activation(**{**a, "layers": tuple(a["layers"]), "index": tuple(a.get("index", ()))})
            for a in values["activations"]
        )
        return cls(**{**values, "activations": points})


@dataclass(frozen=True)
class ArraySpec:
    """An array of the store. `axis` is the one that units divide, in rows of `per_unit` each."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float
    axis: int
    per_unit: int
    chunk: int  # rows of an inner chunk along `axis`


TOKEN_COLUMNS = {
    "id": ("int32", -1), "sequence": ("int32", -1), "position": ("int32", -1), "message": ("int32", -1), "part": ("uint8", 0),
    "role": ("int8", -1), "channel": ("uint8", 0), "is_prompt": ("bool", False),
}  # fmt: skip


def arrays(model: Mapping[str, Any], spec: Spec, layout: Layout) -> dict[str, ArraySpec]:
    """Path → description of every array that units write."""
    n, size = layout.n_rows, layout.unit_tokens
    layers, experts, slots, heads = (model[k] for k in ("n_layers", "num_experts", "experts_per_token", "n_heads"))
    expert_dtype = "uint8" if experts <= 256 else "uint16"

    def per_token(dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, fill: float = 0) -> ArraySpec:
        axis = dims.index("token")
        return ArraySpec(dims, shape, dtype, fill, axis, size, min(CHUNK, size))

    found = {f"tokens/{c}": per_token(("token",), (n,), dtype, fill) for c, (dtype, fill) in TOKEN_COLUMNS.items()}
    for column in ("logprob", "entropy"):
        found[f"tokens/{column}"] = per_token(("token",), (n,), "float32", np.nan)
    if spec.routing:
        found["routing/experts"] = per_token(("layer", "token", "slot"), (layers, n, slots), expert_dtype)
        found["routing/gates"] = per_token(("layer", "token", "slot"), (layers, n, slots), "float16")
    if spec.host_routing:
        found["routing/own_experts"] = per_token(("layer", "token", "slot"), (layers, n, slots), expert_dtype)
        found["routing/margin"] = per_token(("layer", "token"), (layers, n), "float16")
        found["routing/forced"] = per_token(("token",), (n,), "bool")
    if spec.router_logits:
        found["routing/logits"] = per_token(("layer", "token", "expert"), (layers, n, experts), "float16")
    if spec.sinks:
        found["attention/sink"] = per_token(("layer", "token", "head"), (layers, n, heads), "float16")
    for a in spec.activations:
        if a.reduce != "moments":
            dims = (f"{a.hook}_layer", "token", f"{a.hook}_d")
            found[f"activations/{a.hook}"] = per_token(dims, (len(a.layers), n, a.d), "uint16")
        if a.sparse:
            found[f"selected/{a.hook}"] = per_token(("token",), (n,), "bool")
    return found | _summaries(model, spec, layout)


def _summaries(model: Mapping[str, Any], spec: Spec, layout: Layout) -> dict[str, ArraySpec]:
    layers, experts, heads = (model[k] for k in ("n_layers", "num_experts", "n_heads"))
    units, rows, channels = len(layout.units), layout.unit_sequences, len(CHANNELS)

    def per_sequence(dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, fill: float = 0) -> ArraySpec:
        return ArraySpec(("row", *dims), (units * rows, *shape), dtype, fill, 0, rows, rows)

    found = {
        "summaries/sequence": per_sequence((), (), "int32", -1),
        "summaries/tokens": per_sequence(("channel",), (channels,), "uint32"),
    }
    if spec.routing:
        shape = (channels, layers, experts)
        found["summaries/expert_count"] = per_sequence(("channel", "layer", "expert"), shape, "uint32")
        found["summaries/gate_sum"] = per_sequence(("channel", "layer", "expert"), shape, "float32")
        pairs = ("expert", "expert_2")
        for name, n in (("coactivation", layers), ("transition", layers - 1)):
            between = "layer" if n == layers else "layer_pair"
            found[f"summaries/{name}"] = ArraySpec(
                ("unit", "channel", between, *pairs), (units, channels, n, experts, experts), "uint32", 0, 0, 1, 1
            )
    if spec.sinks or spec.sink_sums:
        for name in ("sink_sum", "sink_sumsq"):
            found[f"summaries/{name}"] = per_sequence(
                ("channel", "layer", "head"), (channels, layers, heads), "float32"
            )
    for a in spec.activations:
        axes, shape = ("channel", f"{a.hook}_layer", f"{a.hook}_d"), (channels, len(a.layers), a.d)
        found[f"summaries/{a.hook}_sum"] = per_sequence(axes, shape, "float32")
        if a.sparse:
            found[f"summaries/{a.hook}_tokens"] = per_sequence(("channel",), (channels,), "uint32")
        if a.reduce == "moments":
            found[f"summaries/{a.hook}_sumsq"] = per_sequence(axes, shape, "float32")
        if a.sketch:
            dims = ("unit", "channel", f"{a.hook}_layer", f"{a.hook}_d", f"{a.hook}_sketch")
            size = (units, channels, len(a.layers), a.d, a.sketch)
            found[f"summaries/{a.hook}_sketch"] = ArraySpec(dims, size, "float32", 0, 0, 1, 1)
    return found
