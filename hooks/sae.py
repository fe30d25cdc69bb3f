"""Sparse autoencoders of SAELens and dictionary_learning, and their features spliced into a model as hook points.

A folder of SAELens holds cfg.json and sae_weights.safetensors; sparsity.safetensors may be beside them. Its
architectures standard, topk, jumprelu (which BatchTopK and Matryoshka autoencoders are saved as) and gated are read.
A folder of dictionary_learning holds config.json and ae.pt (`hooks.dictionary_learning`).

Reference: SAELens 6.54, saes/*.py; JumpReLU, arXiv 2407.14435; gated, arXiv 2404.16014; topk, arXiv 2406.04093;
BatchTopK, arXiv 2412.06410.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.hooks.dictionary_learning import WEIGHTS as DICTIONARY_WEIGHTS
from workbench.hooks.dictionary_learning import read_dictionary
from workbench.hooks.names import closest_names

_CONFIG, _WEIGHTS, _SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VECTORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_READ: dict[str, tuple[Any, ...]] = {
    "architecture": tuple(_VECTORS),
    "normalize_activations": ("none", "constant_norm_rescale", "layer_norm"),
    "reshape_activations": ("none", "hook_z"),
    "apply_b_dec_to_input": (True, False),
    "rescale_acts_by_decoder_norm": (True, False),
    "activation_fn": ("relu", "topk"),
    "hook_head_index": (None,),
    "dtype": tuple(_DTYPES),
}
_DEFAULTS: dict[str, Any] = {
    "architecture": "standard",
    "normalize_activations": "none",
    "reshape_activations": "none",
    "apply_b_dec_to_input": True,
    "rescale_acts_by_decoder_norm": False,
    "activation_fn": "relu",
    "hook_head_index": None,
    "hook_name": None,
    "k": 0,
}
_REFUSED = {
    "expected_average_only_in": "its factor is not in the folder: fold it in (fold_activation_norm_scaling_factor) "
    "and save again",
    "batchtopk": "it is in training; SAELens' save_inference_model makes a jumprelu of it",
    "matryoshka_batchtopk": "it is in training; SAELens' save_inference_model makes a jumprelu of it",
}


@dataclass(frozen=True)
class SAEConfig:
    """What an autoencoder computes, and the hook point that it was trained on, if its folder names it."""

    architecture: str
    d_in: int
    d_sae: int
    dtype: torch.dtype
    apply_b_dec_to_input: bool
    normalize_activations: str
    reshape_activations: str
    k: int
    rescale_acts_by_decoder_norm: bool
    hook_name: str | None


class SAE(nn.Module):
    """x ≈ features · W_dec + b_dec, the features few and not negative."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    b_enc: Float[Tensor, "d_sae"]
    threshold: Float[Tensor, "d_sae"]  # jumprelu
    b_gate: Float[Tensor, "d_sae"]  # gated, as the next two; instead of b_enc
    b_mag: Float[Tensor, "d_sae"]
    r_mag: Float[Tensor, "d_sae"]
    sparsity: Float[Tensor, "d_sae"] | None  # log10 of the fraction of tokens that a feature is active on

    def __init__(
        self, cfg: SAEConfig, weights: Mapping[str, Tensor], sparsity: Float[Tensor, "d_sae"] | None = None
    ) -> None:
        """Build an SAE from its weights: W_enc [d_in d_sae], W_dec [d_sae d_in], b_enc [d_sae], b_dec [d_in]."""
        super().__init__()
        self.cfg = cfg
        for name, tensor in weights.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("sparsity", sparsity)

    def encode(self, x: Float[Tensor, "*activation"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the features of an activation [*rows d_in], or [*rows head d_head] where the SAE is of hook_z."""
        x, _, _ = self._normalise(x)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        if self.cfg.architecture == "gated":
            open_ = x @ self.W_enc + self.b_gate > 0
            return open_ * torch.relu(x @ (self.W_enc * self.r_mag.exp()) + self.b_mag)
        pre = x @ self.W_enc + self.b_enc
        if self.cfg.architecture == "jumprelu":
            return torch.relu(pre) * (pre > self.threshold)
        if self.cfg.architecture == "standard":
            return torch.relu(pre)
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self.W_dec.norm(dim=-1)
        values, features = pre.topk(self.cfg.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, features, values.relu())

    def decode(
        self, features: Float[Tensor, "*rows d_sae"], like: Float[Tensor, "*activation"] | None = None
    ) -> Float[Tensor, "*activation"]:
        """Return the activation that the features reconstruct.

        Where the SAE normalises its input or flattens heads, `like` is the activation that the features came from:
        its scale, centre and shape are given back.

        Raises:
            InputError: the SAE normalizes its input, and the activation `like` is not given.
        """
        if self.cfg.rescale_acts_by_decoder_norm:
            features = features / self.W_dec.norm(dim=-1)
        out = features @ self.W_dec + self.b_dec
        if like is None:
            if (self.cfg.normalize_activations, self.cfg.reshape_activations) != ("none", "none"):
                raise InputError("this SAE normalises or flattens its input: pass the activation to decode as `like`")
            return out
        _, scale, centre = self._normalise(like)
        out = out * scale + centre
        return out.unflatten(-1, like.shape[-2:]) if self.cfg.reshape_activations == "hook_z" else out

    def error(self, x: Float[Tensor, "*activation"]) -> Float[Tensor, "*activation"]:
        """Return the reconstruction error: x − decode(encode(x))."""
        return x - self.decode(self.encode(x), x)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """x flat and normalised, and the scale and centre that undo it."""
        if self.cfg.reshape_activations == "hook_z":
            x = x.flatten(-2)
        if x.shape[-1] != self.cfg.d_in:
            raise InputError(f"this SAE reads activations of width {self.cfg.d_in}, got {x.shape[-1]}")
        x = x.to(self.W_enc.dtype)
        if self.cfg.normalize_activations == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.cfg.d_in**0.5
            return x / scale, scale, 0.0
        if self.cfg.normalize_activations == "layer_norm":
            centre, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - centre) / (scale + 1e-5), scale, centre
        return x, 1.0, 0.0


@contextmanager
def splice(model: HookedRootModule, sae: SAE, at: str | None = None, *, use_error_term: bool = True) -> Iterator[str]:
    """Replace, within the context, the activation at a hook point by the SAE's reconstruction plus its error.

    Yields the name of a new hook point of the model, `<at>.hook_sae_acts_post`: the features [batch pos d_sae], to be
    recorded and edited like any other. With the error term there is `<at>.hook_sae_error` too; the error is that of
    the features before any edit, and no gradient flows through it. Hooks added at `at` inside see the result.

    Raises:
        InputError: the hook point is not named, does not exist, or has an SAE already.
    """
    at = at or sae.cfg.hook_name
    if at is None:
        raise InputError("the SAE's folder does not state its hook point: give a hook point with `at`")
    if at not in model.hook_dict:
        raise InputError(f"the model has no hook point {at!r}; {closest_names(at, model.hook_dict)}")
    kinds = ("hook_sae_acts_post", "hook_sae_error") if use_error_term else ("hook_sae_acts_post",)
    points = {f"{at}.{kind}": HookPoint() for kind in kinds}
    if taken := model.hook_dict.keys() & points.keys():
        raise InputError(f"an SAE is spliced in at {at!r} already: {min(taken)!r} exists; leave that context first")
    acts, *error = points.values()

    def reconstruct(x: Tensor, hook: HookPoint) -> Tensor:
        features = sae.encode(x)
        out = sae.decode(acts(features), x)
        for point in error:
            out = out + point((x - sae.decode(features, x)).detach())
        return out.to(x.dtype)

    place = model.hook_dict[at]
    handle = place.add_hook(reconstruct, is_permanent=True)
    for name, point in points.items():
        point.name = name
        model.hook_dict[name] = model.mod_dict[name] = point
    try:
        yield next(iter(points))
    finally:
        handle.hook.remove()
        place.fwd_hooks = [other for other in place.fwd_hooks if other is not handle]
        for name in points:
            del model.hook_dict[name], model.mod_dict[name]


def load_sae(folder: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """Return the autoencoder in a folder that SAELens or dictionary_learning wrote.

    Of SAELens it has the dtype that cfg.json names; of dictionary_learning it has float32, as that library reads it.

    Raises:
        InputError: the folder is incomplete or damaged, or the autoencoder is of a kind that is not read here.
    """
    root = Path(folder)
    if (root / DICTIONARY_WEIGHTS).exists() and not (root / _CONFIG).exists():
        options, weights = read_dictionary(root)
        return SAE(SAEConfig(**options), weights).to(device)
    return _load_saelens(root).to(device)


def _load_saelens(root: Path) -> SAE:
    cfg = _read_config(root / _CONFIG)
    shapes = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    shapes |= dict.fromkeys(_VECTORS[cfg.architecture], (cfg.d_sae,))
    weights = _read_tensors(root / _WEIGHTS)
    if "log_threshold" in weights:  # of a JumpReLU saved before SAELens 6
        weights["threshold"] = weights.pop("log_threshold").exp()
    if "scaling_factor" in weights and (weights["scaling_factor"] == 1).all():  # written for a while, of no effect
        del weights["scaling_factor"]
    _check_tensors(root / _WEIGHTS, weights, shapes)
    sparsity = None
    if (root / _SPARSITY).exists():
        tensors = _read_tensors(root / _SPARSITY)
        _check_tensors(root / _SPARSITY, tensors, {"sparsity": (cfg.d_sae,)}, finite=False)
        sparsity = tensors["sparsity"].float()
    return SAE(cfg, {name: weights[name].to(cfg.dtype) for name in shapes}, sparsity)


def _read_config(path: Path) -> SAEConfig:
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        below = sorted({str(weights_file.parent) for weights_file in path.parent.glob(f"*/{DICTIONARY_WEIGHTS}")})
        hint = f"; there is one in {below[0]!r}" if below else ""
        raise InputError(
            f"{path.parent} has no {_CONFIG} (SAELens) and no {DICTIONARY_WEIGHTS} (dictionary_learning): give a "
            f"folder that one of them wrote{hint}"
        ) from error
    except (OSError, InputError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object of options, got {type(raw).__name__}")
    options = _DEFAULTS | {name: value for name, value in _modern(raw).items() if value is not None}
    _check_options(path, options)
    options["dtype"] = _DTYPES[options["dtype"]]
    return SAEConfig(**{field.name: options[field.name] for field in fields(SAEConfig)})


def _modern(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the options under the names of SAELens 6; earlier versions had other names and no separate metadata."""
    metadata = raw.get("metadata")
    options = (metadata if isinstance(metadata, dict) else {}) | raw
    options["dtype"] = str(options.get("dtype", "float32")).removeprefix("torch.")
    options.setdefault("hook_name", options.get("hook_point"))
    options.setdefault("hook_head_index", options.get("hook_point_head_index"))
    options.setdefault("activation_fn", options.get("activation_fn_str"))
    if "reshape_activations" not in options and "hook_z" in str(options["hook_name"]):
        options["reshape_activations"] = "hook_z"
    if isinstance(options.get("normalize_activations"), bool):
        options["normalize_activations"] = ("none", "expected_average_only_in")[options["normalize_activations"]]
    if options["activation_fn"] == "topk":
        kwargs = options.get("activation_fn_kwargs")
        options |= {"architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    return options


def _check_options(path: Path, options: Mapping[str, Any]) -> None:
    """Refuse, by name, options that this module would compute differently."""
    for name, read in _READ.items():
        if (value := options[name]) not in read:
            why = _REFUSED.get(str(value), f"expected {' or '.join(map(str, read))}")
            raise InputError(f"{path}: {name} {value!r} is not read here: {why}")
    topk = options["architecture"] == "topk"
    for name in ("d_in", "d_sae", "k") if topk else ("d_in", "d_sae"):
        if type(value := options.get(name)) is not int or value < 1:
            raise InputError(f"{path}: {name} is {value!r}, expected a positive whole number")
    if topk and options["k"] > options["d_sae"]:
        raise InputError(f"{path}: k {options['k']} is above d_sae {options['d_sae']}")
    if not isinstance(options["hook_name"], str | None):
        raise InputError(f"{path}: hook_name is {options['hook_name']!r}, expected the name of a hook point")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.exists() and not path.is_file():  # safetensors would wait for the writer of a pipe
        raise InputError(f"{path} is not a file: it is a folder, a pipe or a device")
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: the folder is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from error


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, finite: bool = True
) -> None:
    if wrong := sorted(tensors.keys() ^ shapes.keys()):
        raise InputError(f"{path}: tensor {wrong[0]!r} is {'unexpected' if wrong[0] in tensors else 'missing'}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, cfg.json requires {list(shape)}"
            )
        if not tensors[name].is_floating_point() or (finite and not tensors[name].isfinite().all()):
            raise InputError(f"{path}: tensor {name!r} is not of finite floating-point numbers")
