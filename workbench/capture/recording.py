"""Parse what a user asks to record into hook points and arrays of the store.

A record is `routing`, `router_logits`, `sinks`, `logprobs`, `sink_sums` (of the sinks only sums by sequence and
channel), `examples` (of every expert, the tokens of its largest gate weights and a random sample), `neurons` (of every
neuron of the experts, the tokens of its largest activations), `features` (the same of the features of an autoencoder),
a hook point of the blocks, or a user's own (`workbench.capture.recorder`). Options after the name select from it, the
same for every record:

    neurons:3,7                                    the largest activations of the neurons of these layers
    features:saes/layer2                           examples of the features of the autoencoder in this folder
    resid_post                                     every layer, every token
    resid_post:3,7                                 these layers, as resid_post layers=3,7
    router_logits layers=0-3 channel=final         logits of the final channel in layers 0 to 3
    sinks heads=0,12 role=assistant                these heads; experts= of router_logits, slots= inside the experts
    resid_post:11 channel=analysis every=4         these tokens: role, channel, part, message, position, every, last
    mlp_out reduce=norm                            the Euclidean norm at each token
    mlp_out reduce=mean                            the mean over a sequence's tokens of each channel (sums and counts)
    mlp_out reduce=moments sketch=64               also sums of squares, and a sketch of the second moments: the sum
                                                   of x · Ω, where Ω has this number of random columns
    resid_post reduce=message part=content         the mean of each message's tokens, at its last one
    my_records.py:expert_norm layers=0-3           a recorder of a Python file, which is executed
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from workbench.capture import feature_lists, own_record, record_options
from workbench.capture.own_record import axis_sizes, check_expert_axis
from workbench.capture.recorder import Recorder, from_file
from workbench.errors import InputError
from workbench.hooks.names import BLOCK
from workbench.model.config import Config
from workbench.runs.schema import SWITCHES, Activation, Record, Spec

DEFAULT = ("routing", "sinks", "logprobs")
PER_TOKEN = {name: axes.split()[2:] for name, axes in BLOCK.items() if axes.startswith("batch pos ")}
_HAS_ITS_OWN_NAME = {
    "mlp.router.hook_out": "router_logits",
    "mlp.hook_expert_indices": "routing",
    "mlp.hook_expert_weights": "routing",
    "attn.hook_sink": "sinks",
}
# what a user may look for, and where it is
_INSTEAD = {
    "top_experts": "routing",
    "experts": "routing",
    "expert_indices": "routing",
    "gates": "routing",
    "expert_weights": "routing",
    "router": "router_logits",
    "logits": "router_logits",
    "sink": "sinks",
    "attn.sink": "sinks",
    "entropy": "logprobs",
    "logprob": "logprobs",
    "router.out": "router_logits",
    "mlp.router.out": "router_logits",
    "residual": "resid_post",
}
RecordOption = str | Recorder


def parse(record: Sequence[RecordOption] | str, cfg: Config, routing: str = "own") -> Spec:
    """Return the switches, hook points and own records of --record; `hook_` is optional in a hook point's name.

    Raises:
        InputError: a name, layer or option is unknown or given twice.
    """
    record = [record] if isinstance(record, str | Recorder) else list(record)
    record = [" ".join(r.split()) if isinstance(r, str) else r for r in record]
    if repeated := [r for i, r in enumerate(record) if r in record[:i]]:
        raise InputError(f"--record names {_shown(repeated[0])} twice: give it once")
    switches: dict[str, Any] = {name: name in record for name in SWITCHES}
    neurons = [r for r in record if isinstance(r, str) and r.partition(":")[0].split(" ")[0] == "neurons"]
    if len(neurons) > 1:
        raise InputError("--record names neurons twice: give all of its layers once, as in neurons:3,7")
    features = [r for r in record if isinstance(r, str) and feature_lists.is_record(r)]
    others = [r for r in record if r not in neurons and r not in features]
    parsed = [_parsed(r, cfg) for r in others if not (isinstance(r, str) and r in SWITCHES)]
    selected = [a for one in parsed for a, _ in one]
    functions = {a.name: function for one in parsed for a, function in one if function is not None}
    _refuse_repeated(selected, switches)
    if routing not in ("own", "host"):
        raise InputError(f"--routing {routing}: choose own or host")
    needs_routing = {
        "--routing host": (routing == "host", "it records the experts that were forced"),
        "--record examples": (switches["examples"], "examples are chosen by gate weight"),
        "--record neurons": (bool(neurons), "it states which tokens selected an expert"),
    }
    for option, (given, reason) in needs_routing.items():
        if given and not switches["routing"]:
            raise InputError(f"{option}: also record routing, without options: {reason}")
    autoencoders = feature_lists.parse(features, cfg)
    switches["features"] = tuple(autoencoders)
    functions |= {lists.function_name: sae for lists, sae in autoencoders.items()}
    switches["neuron_layers"] = _neuron_layers(neurons[0], cfg) if neurons else ()
    points = tuple(a for a in selected if isinstance(a, Activation))
    own = tuple(a for a in selected if isinstance(a, Record))
    return Spec(activations=points, records=own, functions=functions, host_routing=routing == "host", **switches)


def _neuron_layers(text: str, cfg: Config) -> tuple[int, ...]:
    """Return the layers of a record of neurons."""
    where = f"--record {text}"
    name, *words = text.split()
    _, _, layers = name.partition(":")
    options = record_options.read(text, [*([f"layers={layers}"] if layers else []), *words])
    selected = record_options.layers(where, options.pop("layers", ()), cfg.n_layers)
    _refuse_left(where, "neurons", options)
    return selected


def _shown(record: RecordOption) -> str:
    return record if isinstance(record, str) else record.name


def _refuse_repeated(selected: Sequence[Activation | Record], switches: dict[str, bool]) -> None:
    """Refuse two records of one name, which would be one array."""
    stored = {"experts": "routing", "gates": "routing", "router_logits": "router_logits", "sink": "sinks"}
    names = [a.name for a in selected]
    for a in selected:
        public = stored.get(a.name, a.name)
        if names.count(a.name) > 1 or switches.get(public):
            raise InputError(
                f"--record names {public} twice: give all of its options once, as in '{public} layers=3,7 "
                "channel=final', or name a second selection with wb.Recorder"
            )


def _parsed(record: RecordOption, cfg: Config) -> list[tuple[Activation | Record, Any]]:
    """Return the record that a text or a Recorder asks for, and its function if it has one of its own."""
    if isinstance(record, Recorder):
        return [own_record.parse(record, cfg)]
    if not isinstance(record, str):
        raise InputError(f"record {record!r}: a record is text such as 'resid_post:3,7', or a wb.Recorder")
    name, *words = record.split() or [""]
    if _is_own(name):
        return [own_record.parse(from_file(name).with_options(record_options.read(record, words)), cfg)]
    point, _, layers = name.partition(":")
    options = record_options.read(record, [*([f"layers={layers}"] if layers else []), *words])
    if point in SWITCHES:
        return [(a, None) for a in _selected(record, point, options, cfg)]
    return [(_activation(record, point, options, cfg), None)]


def _is_own(name: str) -> bool:
    """Return whether a name is FILE.py:NAME or MODULE:NAME."""
    where, colon, own = name.rpartition(":")
    return bool(colon) and own.isidentifier() and (where.endswith(".py") or _hook_of(where) is None)


def _hook_of(point: str) -> str | None:
    """Return the hook point of a block with this name, `hook_` being optional."""
    if point in SWITCHES:
        return point
    return own_record.block_hook(point)


def _selected(text: str, name: str, options: dict[str, Any], cfg: Config) -> list[Record]:
    """Return the records of a built-in quantity with options: of routing two, experts and gate weights."""
    where = f"--record {text}"
    if name in ("logprobs", "sink_sums", "examples"):
        instead = "sinks reduce=moments" if name == "sink_sums" else name
        raise InputError(f"{where}: {name} takes no options: record {instead!r}, and select when you read")
    layers = record_options.layers(where, options.pop("layers", ()), cfg.n_layers)
    hooks = {
        "routing": (("experts", "mlp.hook_expert_indices"), ("gates", "mlp.hook_expert_weights")),
        "router_logits": (("router_logits", "mlp.router.hook_out"),),
        "sinks": (("sink", "attn.hook_sink"),),
    }[name]
    axes = axis_sizes(PER_TOKEN[hooks[0][1]], cfg)
    check_expert_axis(where, axes, layers, cfg)
    if name == "routing" and "experts" in options:
        raise InputError(
            f"{where}: routing has no experts= (it holds the numbers of the chosen ones): leave it out, and select "
            "when you read, as in dataset['experts'] == 3"
        )
    index, index_dim = record_options.index(where, name, axes, options)
    chosen = record_options.tokens(where, options)
    only = ("raw",) if name == "routing" else record_options.OWN_REDUCTIONS
    counts = "; expert numbers have no mean (without options, routing is also summed up by sequence and channel)"
    reduce = record_options.reduction(where, options, only, counts if name == "routing" else "")
    _refuse_left(where, name, options)
    shape = tuple(len(index) if dim == index_dim else size for dim, size in axes.items())
    wide = "uint8" if cfg.num_experts <= 256 else "uint16"
    keep = slice(0, -1 if reduce == "norm" else None)
    return [
        Record(
            own,
            hook,
            layers,
            tuple(axes)[keep],
            shape[keep],
            wide if own == "experts" else "float32" if reduce == "norm" else "float16",
            index,
            index_dim,
            chosen,
            reduce,
        )
        for own, hook in hooks
    ]


def _activation(text: str, point: str, options: dict[str, Any], cfg: Config) -> Activation | Record:
    """Return the record of a hook point."""
    where, hook = f"--record {text}", _hook_of(point)
    _refuse_unknown(where, point, hook)
    assert hook is not None
    layers = record_options.layers(where, options.pop("layers", ()), cfg.n_layers)
    axes = axis_sizes(PER_TOKEN[hook], cfg)
    check_expert_axis(where, axes, layers, cfg)
    index, index_dim = record_options.index(where, point, axes, options)
    chosen, reduce = record_options.tokens(where, options), record_options.reduction(where, options)
    sketch = int(options.pop("sketch", 0))
    if sketch and reduce != "moments":
        raise InputError(f"{where}: sketch= goes with reduce=moments: add it, or leave sketch= out")
    _refuse_left(where, point, options)
    shape = tuple(len(index) if dim == index_dim else size for dim, size in axes.items())
    if reduce in ("norm", "mean"):
        keep = slice(0, -1 if reduce == "norm" else None)
        return Record(hook, hook, layers, tuple(axes)[keep], shape[keep], "float32", index, index_dim, chosen, reduce)
    return Activation(hook, layers, math.prod(shape), index, chosen, reduce, sketch, tuple(axes))


def _refuse_unknown(where: str, point: str, hook: str | None) -> None:
    if "=" in point:
        raise InputError(f"{where}: {point} is an option: write it after a record, as in 'router_logits {point}'")
    if point in _INSTEAD or hook in _HAS_ITS_OWN_NAME:
        instead = _INSTEAD.get(point) or _HAS_ITS_OWN_NAME[str(hook)]
        raise InputError(f"{where}: {point} is recorded as {instead}: write --record {instead!r}")
    if hook in BLOCK and hook not in PER_TOKEN:
        raise InputError(
            f"{where}: {point} has a value for each pair of tokens, not for each token: reduce it with a wb.Recorder, "
            "see docs/howto/record.md"
        )
    if hook is None:
        known = sorted(h.replace("hook_", "") for h in PER_TOKEN if h not in _HAS_ITS_OWN_NAME)
        raise InputError(
            f"{where}: cannot record {point!r}: choose from {', '.join(SWITCHES)}, neurons, features:FOLDER, or the "
            f"hook points {', '.join(known)}, or name a recorder as FILE.py:NAME"
        )


def _refuse_left(where: str, name: str, options: dict[str, Any]) -> None:
    if options:
        key = next(iter(options))
        raise InputError(f"{where}: {name} has no option {key}=: leave it out")


def wanted(spec: Spec, cfg: Config) -> dict[str, torch.dtype]:
    """Return the hook points of the spec and the dtype in which each is stored."""
    names: dict[str, torch.dtype] = {}
    if spec.routing:
        names["mlp.hook_expert_indices"] = torch.uint8 if cfg.num_experts <= 256 else torch.uint16
        names["mlp.hook_expert_weights"] = torch.float16
    if spec.router_logits:
        names["mlp.router.hook_out"] = torch.float16
    if spec.sinks or spec.sink_sums:
        names["attn.hook_sink"] = torch.float16
    chosen = {f"blocks.{layer}.{p.hook}": torch.bfloat16 for p in spec.activations for layer in p.layers}
    own = {f"blocks.{layer}.{r.hook}": getattr(torch, r.dtype) for r in spec.records for layer in r.layers}
    everywhere = {f"blocks.{layer}.{n}": dtype for layer in range(cfg.n_layers) for n, dtype in names.items()}
    return own | everywhere | chosen


def bytes_per_token(spec: Spec, cfg: Config) -> dict[str, int]:
    """Return the bytes of a token in each array before compression; tokens and their labels first."""
    sizes = {"tokens": 28}
    if spec.routing:
        wide = 1 if cfg.num_experts <= 256 else 2
        sizes["routing"] = cfg.n_layers * cfg.experts_per_token * (wide + 2)
    if spec.router_logits:
        sizes["router_logits"] = cfg.n_layers * cfg.num_experts * 2
    if spec.sinks:
        sizes["sinks"] = cfg.n_layers * cfg.n_heads * 2
    sizes |= {a.hook: len(a.layers) * a.d * 2 for a in spec.activations if a.per_token}
    own = {r.name: len(r.layers) * r.d * getattr(torch, r.dtype).itemsize for r in spec.records if r.per_token}
    return sizes | own
