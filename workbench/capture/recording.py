"""What to record, as a user writes it, and the hook points and store arrays it means.

`routing`, `router_logits`, `sinks` (or `sink_sums`, by sequence and channel alone), `logprobs`, or a hook point of the blocks, in one word or with options behind it:

    resid_post                                     every layer, every token
    resid_post:3,7                                 these layers
    attn.z:5 index=0,12                            these heads (of whatever axis stands behind pos)
    resid_post:11 channel=analysis every=4         these tokens: role, channel, part, message, position, every, last
    resid_post reduce=message part=content         the mean of each message's tokens, at its last one
    mlp_out reduce=moments sketch=64               sums and squares a sequence and channel, and a sketch of the second
                                                   moments: x · Ω summed, with Ω of so many random columns
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from workbench import harmony
from workbench.errors import InputError
from workbench.hooks.names import BLOCK
from workbench.model.config import Config
from workbench.runs.schema import Activation, Spec

DEFAULT = ("routing", "sinks", "logprobs")
_SWITCHES = ("routing", "router_logits", "sinks", "sink_sums", "logprobs")
_PER_TOKEN = {name: axes.split()[2:] for name, axes in BLOCK.items() if axes.startswith("batch pos ")}
REDUCTIONS = ("raw", "message", "moments")
_HAS_ITS_OWN_NAME = ("mlp.router.hook_out", "mlp.hook_expert_indices", "mlp.hook_expert_weights", "attn.hook_sink")


def parse(record: Sequence[str], cfg: Config, routing: str = "own") -> Spec:
    """Return the switches and hook points of --record; a hook point is named within its block, `hook_` is optional.

    Raises:
        InputError: a name, layer or option is unknown or given twice.
    """
    if repeated := sorted({r for r in record if list(record).count(r) > 1}):
        raise InputError(f"--record names {', '.join(repeated)} twice: once is enough")
    switches = {name: name in record for name in _SWITCHES}
    points = tuple(_activation(name, cfg) for name in record if name not in _SWITCHES)
    if twice := sorted({p.hook for p in points if [q.hook for q in points].count(p.hook) > 1}):
        raise InputError(f"--record names {', '.join(twice)} twice: list its layers once, as in resid_post:3,7")
    if routing not in ("own", "host"):
        raise InputError(f"--routing {routing}: choose own or host")
    if routing == "host" and not switches["routing"]:
        raise InputError("--routing host: also record routing, which holds the experts that were forced")
    return Spec(activations=points, host_routing=routing == "host", **switches)


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
    everywhere = {f"blocks.{layer}.{n}": dtype for layer in range(cfg.n_layers) for n, dtype in names.items()}
    chosen = {f"blocks.{layer}.{p.hook}": torch.bfloat16 for p in spec.activations for layer in p.layers}
    return everywhere | chosen


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
    return sizes | {a.hook: len(a.layers) * a.d * 2 for a in spec.activations if a.reduce != "moments"}


def _activation(text: str, cfg: Config) -> Activation:
    name, *words = text.split()
    point, _, layers = name.partition(":")
    hook = point if "hook_" in point else ".".join([*point.split(".")[:-1], "hook_" + point.split(".")[-1]])
    if hook not in _PER_TOKEN or hook in _HAS_ITS_OWN_NAME:
        known = sorted(h.replace("hook_", "") for h in _PER_TOKEN if h not in _HAS_ITS_OWN_NAME)
        raise InputError(
            f"cannot record {point!r}: choose from {', '.join(_SWITCHES)} or, with layers, {', '.join(known)}"
        )
    options = _options(text, words)
    sizes = {"head": cfg.n_heads, "kv": cfg.n_key_value_heads, "slot": cfg.experts_per_token}
    axes = [sizes.get(axis) or int(getattr(cfg, axis, axis)) for axis in _PER_TOKEN[hook]]
    index = options.pop("index", ())
    if index and (len(axes) < 2 or max(index) >= axes[0]):
        said = f"{_PER_TOKEN[hook][0]}s 0 to {axes[0] - 1}" if len(axes) > 1 else "no heads or slots"
        raise InputError(f"--record {text}: index {','.join(map(str, index))}, but {point} has {said}")
    reduce, sketch = options.pop("reduce", "raw"), options.pop("sketch", 0)
    if sketch and reduce != "moments":
        raise InputError(f"--record {text}: a sketch goes with reduce=moments")
    d = math.prod([len(index) or axes[0], *axes[1:]])
    return Activation(hook, _layers(layers, cfg.n_layers, text), d, index, options, reduce, sketch)


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_READS: dict[str, Callable[[str], Any]] = {
    "index": lambda text: tuple(sorted(set(_numbers(text)))),
    "role": _names, "channel": _names, "part": _names, "message": _numbers, "position": _numbers, "every": int, "last": int,
    "reduce": str, "sketch": int,
}  # fmt: skip


def _options(text: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a hook point; options other than index and reduce select tokens."""
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in _READS or not value or key in options:
            raise InputError(f"--record {text}: {word!r} is not one of {', '.join(f'{o}=' for o in _READS)}, once each")
        try:
            options[key] = _READS[key](value)
        except ValueError as error:
            raise InputError(f"--record {text}: {key} takes numbers, with commas between") from error
    if options.get("reduce", "raw") not in REDUCTIONS:
        raise InputError(f"--record {text}: reduce={options['reduce']}: choose one of {', '.join(REDUCTIONS)}")
    if options.get("sketch", 1) < 1 or min(options.get("index", [0])) < 0:
        raise InputError(f"--record {text}: sketch counts directions, from 1; an index counts from 0")
    harmony.check_token_set(**{k: v for k, v in options.items() if k not in ("index", "reduce", "sketch")})
    return options


def _layers(text: str, n_layers: int, name: str) -> tuple[int, ...]:
    if not text:
        return tuple(range(n_layers))
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--record {name}: layers are numbers with commas between, as in resid_post:3,7") from error
    if missing := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise InputError(f"--record {name}: no layer {missing}; the model has layers 0 to {n_layers - 1}")
    return layers
