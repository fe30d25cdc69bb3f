"""The name and shape of every hook point, for the model, the capture job and `workbench info`.

`full_name` reads TransformerLens' short names, as in ("sink", 1). Torch-free: the packages that read runs use it too.
Axes: batch, pos, head, kv (key-value head), d_head, slot (of the experts a token went to), expert, query_pos, key_pos.
"""

import difflib
import re
from collections.abc import Collection
from typing import Any

from workbench.errors import InputError

BLOCK = {
    "hook_resid_pre": "batch pos d_model",
    "ln1.hook_scale": "batch pos 1",
    "ln1.hook_normalized": "batch pos d_model",
    "attn.hook_q": "batch pos head d_head",
    "attn.hook_k": "batch pos kv d_head",
    "attn.hook_v": "batch pos kv d_head",
    "attn.hook_rot_q": "batch pos head d_head",
    "attn.hook_rot_k": "batch pos kv d_head",
    "attn.hook_attn_scores": "batch head query_pos key_pos",
    "attn.hook_sink": "batch pos head",
    "attn.hook_pattern": "batch head query_pos key_pos",
    "attn.hook_z": "batch pos head d_head",
    "attn.hook_result": "batch pos head d_model",
    "hook_attn_out": "batch pos d_model",
    "hook_resid_mid": "batch pos d_model",
    "ln2.hook_scale": "batch pos 1",
    "ln2.hook_normalized": "batch pos d_model",
    "mlp.router.hook_out": "batch pos expert",
    "mlp.hook_expert_indices": "batch pos slot",
    "mlp.hook_expert_weights": "batch pos slot",
    "mlp.experts.hook_gate": "batch pos slot d_mlp",
    "mlp.experts.hook_pre": "batch pos slot d_mlp",
    "mlp.experts.hook_post": "batch pos slot d_mlp",
    "mlp.experts.hook_out": "batch pos slot d_model",
    "hook_mlp_out": "batch pos d_model",
    "hook_resid_post": "batch pos d_model",
}
FIRST = {"hook_embed": "batch pos d_model"}
LAST = {
    "ln_final.hook_scale": "batch pos 1",
    "ln_final.hook_normalized": "batch pos d_model",
    "unembed.hook_out": "batch pos d_vocab",
}


def hook_points(n_layers: int) -> dict[str, str]:
    """Return name → axes of every hook point, in the order in which a forward pass reaches them."""
    blocks = {f"blocks.{layer}.{name}": axes for layer in range(n_layers) for name, axes in BLOCK.items()}
    return FIRST | blocks | LAST


# Short name → hook point of a block. The last part of every hook point without "hook_" is one too, where it is unique.
_SHORT = {
    "attn": "attn.hook_pattern",
    "attn_logits": "attn.hook_attn_scores",
    "key": "attn.hook_k",
    "query": "attn.hook_q",
    "value": "attn.hook_v",
    "sinks": "attn.hook_sink",
    "router": "mlp.router.hook_out",
    "router_logits": "mlp.router.hook_out",
    "router_scores": "mlp.hook_expert_weights",
    "gates": "mlp.hook_expert_weights",
    "gate": "mlp.experts.hook_gate",
    "pre": "mlp.experts.hook_pre",
    "pre_linear": "mlp.experts.hook_pre",
    "mlp_pre": "mlp.experts.hook_pre",
    "post": "mlp.experts.hook_post",
    "mlp_post": "mlp.experts.hook_post",
    "expert_out": "mlp.experts.hook_out",
}
_LAST = [point.removeprefix("hook_") for name in BLOCK for point in [name.rsplit(".")[-1]]]
_SHORT |= {
    name.rsplit(".")[-1].removeprefix("hook_"): name
    for name in BLOCK
    if _LAST.count(name.rsplit(".")[-1].removeprefix("hook_")) == 1
} | _SHORT
_PARTS = {"attn": "attn.", "a": "attn.", "mlp": "mlp.", "m": "mlp."}  # of a block, as a third part of a short name
_NORMS = {"scale": "hook_scale", "normalized": "hook_normalized"}
_OUTSIDE = {
    "embed": "hook_embed",
    "logits": "unembed.hook_out",
    "scale": "ln_final.hook_scale",
    "normalized": "ln_final.hook_normalized",
}
# What a dense transformer has and this one does not, and where to look instead.
_ABSENT = {
    "hook_pos_embed": "positions are rotary: attn.hook_rot_q and attn.hook_rot_k hold the rotated queries and keys",
    "mlp.hook_pre": "each expert has its own: mlp.experts.hook_pre [batch pos slot d_mlp], short name 'pre'",
    "mlp.hook_pre_linear": "each expert has its own: mlp.experts.hook_pre [batch pos slot d_mlp], short name 'pre'",
    "mlp.hook_post": "each expert has its own: mlp.experts.hook_post [batch pos slot d_mlp], short name 'post'",
    "mlp.hook_mid": "the activation is gated: mlp.experts.hook_post [batch pos slot d_mlp]",
    "mlp.hook_out": "use hook_mlp_out, the sum over the experts, or mlp.experts.hook_out for each of them",
    "mlp.hook_in": "use ln2.hook_normalized, what the router and the experts read before the norm's weight",
}


def full_name(key: Any, n_layers: int) -> str:
    """Return the hook point of a short name: "resid_post1", ("resid_post", 1), ("scale", 0, "ln1") or ("embed",).

    A negative layer counts from the last; a name with a dot or "hook_" is returned as it is.

    Raises:
        InputError: the model has no such layer, or the key is of another kind.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        raise InputError(
            f"{key!r} names no activation: use a hook point's name, or (name, layer) as in ('resid_post', 1)"
        )
    name, layer, part = (*parts, None, None)[:3]
    if "." in name or name.startswith("hook_"):
        return name if layer is None else f"blocks.{_layer(layer, n_layers)}.{name}"
    if (
        layer is None
        and (match := re.fullmatch(r"([a-z_]+?)_?(\d+)(ln[12]|attn|mlp|a|m)?", name))
        and match[1] in {*_SHORT, *_NORMS}
    ):
        name, layer, part = match[1], int(match[2]), match[3]
    if layer is None:
        return _OUTSIDE.get(name, f"hook_{name}")
    block = f"blocks.{_layer(layer, n_layers)}"
    if name in _NORMS:
        return f"{block}.{part or 'ln1'}.{_NORMS[name]}"
    point = _SHORT.get(name, f"hook_{name}")
    if part in _PARTS and not point.startswith(_PARTS[part]):
        raise InputError(f"{key!r}: {name!r} is {point}, not in {_PARTS[part].removesuffix('.')!r}; leave the part out")
    return f"{block}.{point}"


def _layer(layer: Any, n_layers: int) -> int:
    if not hasattr(layer, "__index__") or not -n_layers <= layer < n_layers:
        raise InputError(f"layer {layer!r}: the model has layers 0 to {n_layers - 1} (or -1 for the last)")
    return int(layer) % n_layers


def _of_every_layer(name: str) -> str:
    """Return the hook point of a block that a name without a layer, or with * in its place, means; "" if none."""
    point = re.sub(r"^(blocks\.)?\*\.?", "", name)
    point = _SHORT.get(point.removeprefix("hook_"), point)
    return point if point in BLOCK else ""


def closest_names(name: str, known: Collection[str]) -> str:
    """Return in words where to find what a name that is not known may mean: for an error message."""
    inside = re.sub(r"^blocks\.\d+\.", "", name)
    if inside in _ABSENT:
        return f"a mixture of experts has no {inside}; {_ABSENT[inside]}" if "mlp" in inside else _ABSENT[inside]
    point = _of_every_layer(name)
    if point and (one := next((other for other in known if other.endswith(f".{point}")), None)):
        return f"every layer has one, as {one}: name it, or give lambda name: name.endswith({point!r}) as the filter"
    layers = [int(match[1]) for other in known if (match := re.match(r"blocks\.(\d+)\.", other))]
    wanted = re.match(r"blocks\.(\d+)\.", name)
    if wanted and layers and int(wanted[1]) > max(layers):
        return f"the last layer is {max(layers)}"
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"closest: {', '.join(near)}" if near else f"none of the {len(known)} names is similar"
