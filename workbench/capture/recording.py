"""What to record, as a user writes it, and the hook points and store arrays it means."""

import math
from collections.abc import Sequence

import torch

from workbench.errors import InputError
from workbench.hooks.names import BLOCK
from workbench.model.config import Config
from workbench.runs.schema import Activation, Spec

DEFAULT = ("routing", "sinks", "logprobs")
_SWITCHES = ("routing", "router_logits", "sinks", "logprobs")
_PER_TOKEN = {name: axes.split()[2:] for name, axes in BLOCK.items() if axes.startswith("batch pos ")}
_HAS_ITS_OWN_NAME = ("mlp.router.hook_out", "mlp.hook_expert_indices", "mlp.hook_expert_weights", "attn.hook_sink")


def parse(record: Sequence[str], cfg: Config) -> Spec:
    """`routing`, `router_logits`, `sinks`, `logprobs`, or a hook point with its layers: `resid_post:3,7`.

    A hook point is named within its block, `hook_` left out or not; without layers it means all of them.
    """
    if repeated := sorted({r for r in record if list(record).count(r) > 1}):
        raise InputError(f"--record names {', '.join(repeated)} twice: once is enough")
    switches = {name: name in record for name in _SWITCHES}
    points = tuple(_activation(name, cfg) for name in record if name not in _SWITCHES)
    if twice := sorted({p.hook for p in points if [q.hook for q in points].count(p.hook) > 1}):
        raise InputError(f"--record names {', '.join(twice)} twice: list its layers once, as in resid_post:3,7")
    return Spec(activations=points, **switches)


def wanted(spec: Spec, cfg: Config) -> dict[str, torch.dtype]:
    """Hook points of the spec and the dtype each is stored in."""
    names: dict[str, torch.dtype] = {}
    if spec.routing:
        names["mlp.hook_expert_indices"] = torch.uint8 if cfg.num_experts <= 256 else torch.uint16
        names["mlp.hook_expert_weights"] = torch.float16
    if spec.router_logits:
        names["mlp.router.hook_out"] = torch.float16
    if spec.sinks:
        names["attn.hook_sink"] = torch.float16
    everywhere = {f"blocks.{layer}.{n}": dtype for layer in range(cfg.n_layers) for n, dtype in names.items()}
    chosen = {f"blocks.{layer}.{p.hook}": torch.bfloat16 for p in spec.activations for layer in p.layers}
    return everywhere | chosen


def _activation(name: str, cfg: Config) -> Activation:
    point, _, layers = name.partition(":")
    hook = point if "hook_" in point else ".".join([*point.split(".")[:-1], "hook_" + point.split(".")[-1]])
    if hook not in _PER_TOKEN or hook in _HAS_ITS_OWN_NAME:
        known = sorted(h.replace("hook_", "") for h in _PER_TOKEN if h not in _HAS_ITS_OWN_NAME)
        raise InputError(
            f"cannot record {point!r}: choose from {', '.join(_SWITCHES)} or, with layers, {', '.join(known)}"
        )
    sizes = {"head": cfg.n_heads, "kv": cfg.n_key_value_heads, "slot": cfg.experts_per_token}
    width = math.prod(sizes.get(axis) or int(getattr(cfg, axis, axis)) for axis in _PER_TOKEN[hook])
    return Activation(hook=hook, layers=_layers(layers, cfg.n_layers, name), d=width)


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
