"""Read the folders of autoencoders that dictionary_learning writes: ae.pt, a state dict, and config.json.

`hooks.sae.load_sae` uses it; published autoencoders of gpt-oss-20b have this form. Each class of the library is one of
the architectures of `hooks.sae` under other names. BatchTopK and Matryoshka compare activations with the threshold that
their training estimated, as the library does when it encodes.

Reference: dictionary_learning 0.1.0 (Marks, Karvonen and Mueller), dictionary.py, trainers/*.py and utils.py.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.hooks.torch_file import read_torch_file

CONFIG, WEIGHTS = "config.json", "ae.pt"
# Of nn.Linear, which stores its matrix transposed; and of a plain parameter.
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


@dataclass(frozen=True)
class _DictionaryClass:
    """A class of the library: what it computes, and its names of our tensors."""

    architecture: str
    names: Mapping[str, str]
    apply_b_dec_to_input: bool = True
    other: frozenset[str] = frozenset()  # tensors that encoding and decoding do not use
    unit_decoder: bool = False  # the library scales the decoder's rows to length 1 when it reads the file


_CLASSES = {
    "AutoEncoder": _DictionaryClass("standard", _LINEAR | {"b_dec": "bias"}, unit_decoder=True),
    "AutoEncoderNew": _DictionaryClass("standard", _LINEAR | {"b_dec": "decoder.bias"}, apply_b_dec_to_input=False),
    "AutoEncoderTopK": _DictionaryClass("topk", _LINEAR | {"b_dec": "b_dec"}, other=frozenset({"k", "threshold"})),
    "BatchTopKSAE": _DictionaryClass(
        "jumprelu", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, other=frozenset({"k"})
    ),
    "MatryoshkaBatchTopKSAE": _DictionaryClass("jumprelu", _PLAIN, other=frozenset({"k", "group_sizes"})),
    "JumpReluAutoEncoder": _DictionaryClass("jumprelu", _PLAIN, apply_b_dec_to_input=False),
    "GatedAutoEncoder": _DictionaryClass(
        "gated",
        {
            "W_enc": "encoder.weight",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
}


def read_dictionary(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of an `hooks.sae.SAEConfig` and the tensors of a folder with ae.pt, in float32.

    Tensors have the names and shapes of `hooks.sae.SAE`: W_enc [d_in d_sae], W_dec [d_sae d_in], b_dec [d_in], others
    [d_sae].

    Raises:
        InputError: a file is missing or damaged, the class is not one of the library's autoencoders, or the tensors are
            not those of the class and the sizes in config.json.
    """
    trainer, read_from = _read_config(folder / CONFIG)
    kind = _CLASSES[trainer["dict_class"]]
    state = _read_state(folder / WEIGHTS, kind)
    _check_k(folder, trainer, state)
    d_in, d_sae = trainer["activation_dim"], trainer["dict_size"]
    weights = {
        name: state[theirs].T if theirs.endswith(".weight") else state[theirs] for name, theirs in kind.names.items()
    }
    _check_tensors(folder / WEIGHTS, kind, weights, d_in, d_sae)
    if "threshold" in weights and weights["threshold"].ndim == 0:
        if weights["threshold"] < 0:
            warnings.warn(
                f"{folder / WEIGHTS}: the threshold was never estimated in training ({weights['threshold']:g}), so "
                "every positive feature counts as active, as in dictionary_learning",
                stacklevel=3,
            )
        weights["threshold"] = weights["threshold"].expand(d_sae)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if kind.unit_decoder:
        length = weights["W_dec"].norm(dim=-1)
        weights |= {"W_enc": weights["W_enc"] * length, "b_enc": weights["b_enc"] * length}
        weights["W_dec"] = weights["W_dec"] / length[:, None]
    options = {
        "architecture": kind.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": torch.float32,
        "apply_b_dec_to_input": kind.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": trainer["k"] if kind.architecture == "topk" else 0,
        "rescale_acts_by_decoder_norm": False,
        "hook_name": _hook_name(trainer, read_from),
    }
    return options, weights


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Return the trainer's options, with sizes that are valid, and whether it read a module's output ("out") or
    input.
    """
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has {WEIGHTS} and no {CONFIG}: the folder is incomplete") from error
    except (OSError, InputError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}") from error
    trainer = raw.get("trainer") if isinstance(raw, dict) else None
    if not isinstance(trainer, dict):
        raise InputError(f"{path}: expected an object `trainer`, as dictionary_learning writes it")
    if not isinstance(dict_class := trainer.get("dict_class"), str) or dict_class not in _CLASSES:
        raise InputError(f"{path}: dict_class {dict_class!r} is not read here: expected {' or '.join(_CLASSES)}")
    topk = _CLASSES[dict_class].architecture == "topk"
    for name in ("activation_dim", "dict_size", "k") if topk else ("activation_dim", "dict_size"):
        if type(value := trainer.get(name)) is not int or value < 1:
            raise InputError(f"{path}: {name} is {value!r}, expected a positive whole number")
    if topk and trainer["k"] > trainer["dict_size"]:
        raise InputError(f"{path}: k {trainer['k']} is above dict_size {trainer['dict_size']}")
    buffer = raw.get("buffer")
    return trainer, str(buffer.get("io", "out")) if isinstance(buffer, dict) else "out"


def _read_state(path: Path, kind: _DictionaryClass) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which are exactly those of the class."""
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path}: expected a state dict, names and their tensors")
    state = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}  # of torch.compile
    if missing := sorted(set(kind.names.values()) - state.keys()):
        raise InputError(f"{path}: tensor {missing[0]!r} is missing")
    if surplus := sorted(state.keys() - set(kind.names.values()) - kind.other):
        raise InputError(f"{path}: tensor {surplus[0]!r} is unexpected: config.json states another class")
    return state


def _check_k(folder: Path, trainer: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    if "k" in state and (state["k"].numel() != 1 or int(state["k"]) != trainer.get("k")):
        sparsity = state["k"].flatten().tolist()[:3]
        raise InputError(
            f"{folder}: k is {sparsity} in {WEIGHTS} and {trainer.get('k')!r} in {CONFIG}; they must agree"
        )


def _check_tensors(path: Path, kind: _DictionaryClass, weights: Mapping[str, Tensor], d_in: int, d_sae: int) -> None:
    """Refuse shapes other than config.json's, integers, and numbers that are not finite."""
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in weights.items():
        shape = expected.get(name, (d_sae,))
        if tuple(tensor.shape) != shape and not (name == "threshold" and tensor.ndim == 0):
            raise InputError(
                f"{path}: tensor {kind.names[name]!r} is {list(tensor.shape)} as [input, output], activation_dim and "
                f"dict_size of {CONFIG} make it {list(shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {kind.names[name]!r} is not of finite floating-point numbers")


def _hook_name(trainer: Mapping[str, Any], read_from: str) -> str | None:
    """Return the hook point of a module's name such as resid_post_layer_11, or none if the config does not state it."""
    match = re.fullmatch(r"(\w+?)_layer_(\d+)", str(trainer.get("submodule_name")))
    if match is None or match[1] not in _HOOKS or read_from != "out":
        return None
    return f"blocks.{int(match[2])}.{_HOOKS[match[1]]}"
