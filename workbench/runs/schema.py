"""Schema 4 of a run: its arrays with their shapes, and the units in which they are written.

A run is a Zarr v3 group. Token rows are laid out in *units*: a unit consists of complete shards that no other unit
writes, so units can be written in any order by anybody, and each is committed by one flag after everything else of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS

# 1 had every token of an activation, 2 no manifests, 3 names of hooks in dimensions and no `records`. All are read.
SCHEMA = 4
MANIFESTS = 3  # the first schema that has them
CHUNK = 1024  # token rows of an inner chunk
N_EXAMPLES = 16  # of an expert, in each list
N_NEURON_EXAMPLES = 8  # of a neuron, in each channel
N_NEURON_RANDOM = 4  # tokens of an expert in each channel, at which the activations of all its neurons are kept
N_FEATURE_EXAMPLES = 8  # of a feature of an autoencoder, in each channel and list
# quantities that are recorded or not, without options: fields of `Spec`
SWITCHES = ("routing", "router_logits", "sinks", "sink_sums", "logprobs", "examples")
# name of a quantity of tokens in a dataset → its path in the store
STORED_AS = {
    "experts": "routing/experts",
    "gates": "routing/gates",
    "router_logits": "routing/logits",
    "sink": "attention/sink",
    "own_experts": "routing/own_experts",
    "router_margin": "routing/margin",
    "forced": "routing/forced",
    "logprob": "tokens/logprob",
    "entropy": "tokens/entropy",
}
EXAMPLE_GROUPS = ("examples/", "neurons/", "features/")  # groups of the store that hold lists of examples
EXAMPLE_KINDS = ("top", "random")
# arrays of lists of examples: name → dtype, and the value where there is no example
_TOKEN_OF_EXAMPLE = {"sequence": ("int32", -1), "position": ("int32", -1)}
EXAMPLE_FIELDS = {"gate": ("float16", 0), **_TOKEN_OF_EXAMPLE}
NEURON_FIELDS = {"activation": ("float16", 0), **_TOKEN_OF_EXAMPLE}
FEATURE_FIELDS = {"activation": ("float32", 0), **_TOKEN_OF_EXAMPLE}


@dataclass(frozen=True)
class Unit:
    """The unit of work, of files and of commits: token rows [start, start + capacity) and the sequences in them."""

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
        """Return the token rows, gaps included."""
        return self.units[-1].start + self.units[-1].capacity

    @property
    def unit_sequences(self) -> int:
        """Return the summary rows of a unit: as many as the fullest unit has sequences."""
        return max(len(unit.sequences) for unit in self.units)

    def is_consistent(self) -> bool:
        """Return whether units follow each other and hold their sequences one after another, without overlap."""
        counts, starts, capacities = (
            np.array(column, dtype=np.int64)
            for column in zip(*((len(u.sequences), u.start, u.capacity) for u in self.units), strict=True)
        )
        offsets, lengths = (np.array(column, dtype=np.int64) for column in (self.offsets, self.lengths))
        if counts.sum() != len(lengths) or len(offsets) != len(lengths) or (lengths < 0).any():
            return False
        before = np.cumsum(lengths) - lengths  # tokens of all sequences before each
        ends = np.append(before, lengths.sum())[np.cumsum(counts)]
        used = np.diff(ends, prepend=0)
        inside = np.repeat(starts - (ends - used), counts) + before
        follow = np.array_equal(starts, np.cumsum(capacities) - capacities)
        return follow and bool((used <= capacities).all()) and np.array_equal(offsets, inside)


@dataclass(frozen=True)
class Activation:
    """A hook point inside the blocks, the layers it is recorded in, and the values a token has there.

    index: which of the axis after pos (heads, experts), all if empty. tokens: arguments of `harmony.token_set`, every
    token if empty. reduce: "raw"; "message", the mean of each message's tokens at its last one; or "moments", only
    sums and squares by sequence and channel, with a sketch of this many directions of their second moments. dims: of
    the values of a token, as ("head", "d_head"), which the store holds in one row; runs before schema 4 do not name
    them.
    """

    hook: str
    layers: tuple[int, ...]
    d: int
    index: tuple[int, ...] = ()
    tokens: Mapping[str, Any] = field(default_factory=dict)
    reduce: str = "raw"
    sketch: int = 0
    dims: tuple[str, ...] = ()

    summed = True  # by sequence and channel

    @property
    def name(self) -> str:
        """Return the name of its arrays in the store and of its variable in the dataset."""
        return self.hook

    @property
    def sparse(self) -> bool:
        """Return whether some tokens have no row of their own."""
        return bool(self.tokens) or self.reduce != "raw"

    @property
    def per_token(self) -> bool:
        """Return whether tokens have values of their own, not only sums by sequence and channel."""
        return self.reduce not in ("moments", "mean")


@dataclass(frozen=True)
class Record:
    """A quantity with a name of its own, in its own dtype and dimensions: a selection, a reduction, or a user's own.

    hook: of the blocks, where it is computed. dims, shape: of the values of a token; index: which entries of the axis
    `index_dim` are recorded, all if empty. tokens: as in `Activation`. reduce: "raw", "norm" (Euclidean norm over the
    last axis), "mean" (only sums by sequence and channel), "moments" (also sums of squares), or "own", a function
    with this digest of its source.
    """

    name: str
    hook: str
    layers: tuple[int, ...]
    dims: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    index: tuple[int, ...] = ()
    index_dim: str = ""
    tokens: Mapping[str, Any] = field(default_factory=dict)
    reduce: str = "raw"
    digest: str = ""
    description: str = ""
    unit: str = ""

    @property
    def sparse(self) -> bool:
        """Return whether some tokens have no row of their own."""
        return bool(self.tokens) or not self.per_token

    @property
    def per_token(self) -> bool:
        """Return whether tokens have values of their own, not only sums by sequence and channel."""
        return self.reduce not in ("moments", "mean")

    @property
    def summed(self) -> bool:
        """Return whether sums by sequence and channel are meaningful; those of expert numbers are not."""
        return self.dtype not in ("uint8", "uint16")

    @property
    def d(self) -> int:
        """Return the number of values of a token in a layer."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class FeatureLists:
    """Lists of examples of an autoencoder's features: the hook point that it reads, its features, and its digest."""

    hook: str  # with its block, as "blocks.2.hook_resid_post"
    d_sae: int
    digest: str

    @property
    def layer(self) -> int:
        """Return the layer of the hook point."""
        return int(self.hook.split(".")[1])

    @property
    def function_name(self) -> str:
        """Return the name of the autoencoder in a specification's functions."""
        return f"features:{self.hook}"


@dataclass(frozen=True)
class Spec:
    """What a capture records.

    examples: the tokens of each expert's largest gate weights, and a random sample (`workbench.runs.examples`).
    neuron_layers: those of which every neuron's largest activations are kept (`workbench.runs.neuron_examples`).
    features: autoencoders of which every feature's examples are kept (`workbench.runs.feature_examples`).
    sink_sums: of the sinks only the sums by sequence and channel. host_routing: the experts are those that a host
    chose; the router's own choices, the margin between its k-th and (k+1)-th logit, and which tokens were forced are
    beside. functions: of records that reduce by a user's function, by their names; not stored, and of no meaning to a
    reader.
    """

    routing: bool
    router_logits: bool
    sinks: bool
    logprobs: bool
    activations: tuple[Activation, ...] = ()
    sink_sums: bool = False
    host_routing: bool = False
    examples: bool = False
    neuron_layers: tuple[int, ...] = ()
    features: tuple[FeatureLists, ...] = ()
    records: tuple[Record, ...] = ()
    functions: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self, schema: int = SCHEMA) -> dict[str, Any]:
        """Return the plain values, as a run of this schema holds them."""
        switches = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("functions", "records")}
        values = switches | {"activations": [_plain(a) for a in self.activations]}
        values["neuron_layers"] = list(self.neuron_layers)
        values["features"] = [asdict(lists) for lists in self.features]
        # runs that were begun before there were these fields can be resumed
        for name in ("host_routing", "examples", "neuron_layers", "features"):
            if not values[name]:
                del values[name]
        for a in values["activations"] if schema < 4 else ():
            del a["dims"]
        return values | ({"records": [_plain(r) for r in self.records]} if self.records else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Spec":
        """Return the inverse of `to_json`, without functions.

        Raises:
            InputError: a newer workbench wrote a field that this one does not have.
        """
        points = tuple(_from_plain(Activation, a) for a in values["activations"])
        records = tuple(_from_plain(Record, r) for r in values.get("records", ()))
        features = tuple(_from_plain(FeatureLists, lists) for lists in values.get("features", ()))
        return _from_plain(cls, {**values, "activations": points, "records": records, "features": features})

    @property
    def selected(self) -> tuple["Activation | Record", ...]:
        """Return the quantities that have hook points of their own: activations and records."""
        return (*self.activations, *self.records)


def _plain(recorded: "Activation | Record") -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recorded).items()}


_Fields = TypeVar("_Fields", "Activation", "Record", "FeatureLists", "Spec")


def _from_plain(kind: type[_Fields], values: Mapping[str, Any]) -> _Fields:
    if unknown := sorted(set(values) - {f.name for f in fields(kind)}):
        raise InputError(
            f"the run was recorded with {unknown[0]!r}, which this workbench does not have: update the workbench"
        )
    arguments: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    return kind(**arguments)


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

    def fits(self, array: Any) -> bool:
        """Return whether a Zarr array has this shape, dtype and these dimensions."""
        dims = tuple(array.metadata.dimension_names or ())
        return (array.shape, str(array.dtype), dims) == (self.shape, self.dtype, self.dims)


TOKEN_COLUMNS = {
    "id": ("int32", -1),
    "sequence": ("int32", -1),
    "position": ("int32", -1),
    "message": ("int32", -1),
    "part": ("uint8", 0),
    "role": ("int8", -1),
    "channel": ("uint8", 0),
    "is_prompt": ("bool", False),
}


def layer_dim(layers: tuple[int, ...], n_layers: int) -> str:
    """Return the dimension of these layers: "layer" if they are all, else with their ranges, as "layer_0to3_7"."""
    if layers == tuple(range(n_layers)):
        return "layer"
    return "layer_" + "_".join(f"{a}to{b}" if b > a else str(a) for a, b in _ranges(layers))


def _ranges(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the first and last number of each range of consecutive numbers."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def stored_dims(recorded: "Activation | Record", n_layers: int, schema: int = SCHEMA) -> tuple[str, tuple[str, ...]]:
    """Return the dimension of the layers, and those of a token's values, as they are in the store.

    Values of an activation are stored in a row, those of the heads one after another: "head_d_head".
    """
    if schema < 4:
        return f"{recorded.name}_layer", (f"{recorded.name}_d",)
    layers = layer_dim(recorded.layers, n_layers)
    part = "".join(f"_{i}" for i in recorded.index)
    if isinstance(recorded, Activation):
        first, *others = recorded.dims or ("feature",)
        return layers, ("_".join((f"{first}{part}", *others)),)
    return layers, tuple(f"{dim}{part}" if dim == recorded.index_dim else dim for dim in recorded.dims)


def arrays(model: Mapping[str, Any], spec: Spec, layout: Layout, schema: int = SCHEMA) -> dict[str, ArraySpec]:
    """Return path → description of every array that units write; schema: of the run, which names some dimensions."""
    n, size = layout.n_rows, layout.unit_tokens
    layers, experts, slots, heads = (model[k] for k in ("n_layers", "num_experts", "experts_per_token", "n_heads"))
    expert_dtype = "uint8" if experts <= 256 else "uint16"

    def per_token(dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, fill: float = 0) -> ArraySpec:
        axis = dims.index("token")
        return ArraySpec(dims, shape, dtype, fill, axis, size, min(CHUNK, size))

    specs = {f"tokens/{c}": per_token(("token",), (n,), dtype, fill) for c, (dtype, fill) in TOKEN_COLUMNS.items()}
    for column in ("logprob", "entropy"):
        specs[f"tokens/{column}"] = per_token(("token",), (n,), "float32", np.nan)
    if spec.routing:
        specs["routing/experts"] = per_token(("layer", "token", "slot"), (layers, n, slots), expert_dtype)
        specs["routing/gates"] = per_token(("layer", "token", "slot"), (layers, n, slots), "float16")
    if spec.host_routing:
        specs["routing/own_experts"] = per_token(("layer", "token", "slot"), (layers, n, slots), expert_dtype)
        specs["routing/margin"] = per_token(("layer", "token"), (layers, n), "float16")
        specs["routing/forced"] = per_token(("token",), (n,), "bool")
    if spec.router_logits:
        specs["routing/logits"] = per_token(("layer", "token", "expert"), (layers, n, experts), "float16")
    if spec.sinks:
        specs["attention/sink"] = per_token(("layer", "token", "head"), (layers, n, heads), "float16")
    if spec.examples:
        specs |= _examples(layers, experts, len(layout.units))
    if spec.neuron_layers:
        specs |= _neurons(model, spec, len(layout.units))
    for lists in spec.features:
        specs |= _features(lists, len(layout.units))
    for a in spec.selected:
        at_layers, features = stored_dims(a, layers, schema)
        if a.per_token:
            kind, values, dtype = (
                ("activations", (a.d,), "uint16") if isinstance(a, Activation) else ("records", a.shape, a.dtype)
            )
            specs[f"{kind}/{a.name}"] = per_token((at_layers, "token", *features), (len(a.layers), n, *values), dtype)
        if a.sparse:
            specs[f"selected/{a.name}"] = per_token(("token",), (n,), "bool")
    return specs | _summaries(model, spec, layout, schema)


def _examples(layers: int, num_experts: int, units: int) -> dict[str, ArraySpec]:
    dims = ("unit", "channel", "layer", "expert", "example")
    shape = (units, len(CHANNELS), layers, num_experts, N_EXAMPLES)
    return {
        f"examples/{kind}_{name}": ArraySpec(dims, shape, dtype, fill, 0, 1, 1)
        for kind in EXAMPLE_KINDS
        for name, (dtype, fill) in EXAMPLE_FIELDS.items()
    }


def _neurons(model: Mapping[str, Any], spec: Spec, units: int) -> dict[str, ArraySpec]:
    layers, experts, neurons = spec.neuron_layers, model["num_experts"], model["d_mlp"]
    dims = ("unit", "channel", layer_dim(layers, model["n_layers"]), "expert", "d_mlp", "neuron_example")
    shape = (units, len(CHANNELS), len(layers), experts, neurons, N_NEURON_EXAMPLES)
    specs = {
        f"neurons/{name}": ArraySpec(dims, shape, dtype, fill, 0, 1, 1) for name, (dtype, fill) in NEURON_FIELDS.items()
    }
    for name, (dtype, fill) in NEURON_FIELDS.items():  # the places of a random sample are those of all neurons
        axes = 5 if name == "activation" else 4
        random_dims, random_shape = (*dims[:axes], "neuron_random"), (*shape[:axes], N_NEURON_RANDOM)
        specs[f"neurons/random_{name}"] = ArraySpec(random_dims, random_shape, dtype, fill, 0, 1, 1)
    return specs


def _features(lists: FeatureLists, units: int) -> dict[str, ArraySpec]:
    """Return the arrays of an autoencoder: examples of each feature, and how many tokens of a channel have it."""
    dims, shape = ("unit", "channel", f"{lists.hook}_feature"), (units, len(CHANNELS), lists.d_sae)
    specs = {f"features/{lists.hook}_count": ArraySpec(dims, shape, "uint32", 0, 0, 1, 1)}
    for kind in EXAMPLE_KINDS:
        for name, (dtype, fill) in FEATURE_FIELDS.items():
            size = (*shape, N_FEATURE_EXAMPLES)
            own = ArraySpec((*dims, "feature_example"), size, dtype, fill, 0, 1, 1)
            specs[f"features/{lists.hook}_{kind}_{name}"] = own
    return specs


def _summaries(model: Mapping[str, Any], spec: Spec, layout: Layout, schema: int) -> dict[str, ArraySpec]:
    layers, experts, heads = (model[k] for k in ("n_layers", "num_experts", "n_heads"))
    units, rows, channels = len(layout.units), layout.unit_sequences, len(CHANNELS)

    def per_sequence(dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, fill: float = 0) -> ArraySpec:
        return ArraySpec(("row", *dims), (units * rows, *shape), dtype, fill, 0, rows, rows)

    specs = {
        "summaries/sequence": per_sequence((), (), "int32", -1),
        "summaries/tokens": per_sequence(("channel",), (channels,), "uint32"),
    }
    if spec.routing:
        shape = (channels, layers, experts)
        specs["summaries/expert_count"] = per_sequence(("channel", "layer", "expert"), shape, "uint32")
        specs["summaries/gate_sum"] = per_sequence(("channel", "layer", "expert"), shape, "float32")
        pairs = ("expert", "expert_2")
        for name, n in (("coactivation", layers), ("transition", layers - 1)):
            between = "layer" if n == layers else "layer_pair"
            specs[f"summaries/{name}"] = ArraySpec(
                ("unit", "channel", between, *pairs), (units, channels, n, experts, experts), "uint32", 0, 0, 1, 1
            )
    if spec.sinks or spec.sink_sums:
        for name in ("sink_sum", "sink_sumsq"):
            specs[f"summaries/{name}"] = per_sequence(
                ("channel", "layer", "head"), (channels, layers, heads), "float32"
            )
    for a in spec.selected:
        at_layers, features = stored_dims(a, layers, schema)
        values = (a.d,) if isinstance(a, Activation) else a.shape
        axes = ("channel", at_layers, *features)
        sizes: tuple[int, ...] = (channels, len(a.layers), *values)
        if a.summed:
            specs[f"summaries/{a.name}_sum"] = per_sequence(axes, sizes, "float32")
        if a.sparse:
            specs[f"summaries/{a.name}_tokens"] = per_sequence(("channel",), (channels,), "uint32")
        if a.reduce == "moments":
            specs[f"summaries/{a.name}_sumsq"] = per_sequence(axes, sizes, "float32")
        if isinstance(a, Activation) and a.sketch:
            dims = ("unit", *axes, "sketch" if schema >= 4 else f"{a.hook}_sketch")
            size = (units, *sizes, a.sketch)
            specs[f"summaries/{a.name}_sketch"] = ArraySpec(dims, size, "float32", 0, 0, 1, 1)
    return specs
