"""LoRA adapters in PEFT's folder format, applied beside weights that stay packed and untouched.

A folder holds adapter_config.json and adapter_model.safetensors. An adapted matrix W of inputs by outputs becomes
W + alpha / rank · Aᵀ · Bᵀ, computed as x · W + (x · Aᵀ) · Bᵀ · alpha / rank. Linear maps have A [rank, inputs] and
B [outputs, rank]. PEFT reaches the experts as parameters [expert, inputs, outputs] and stacks their pairs in one matrix
each: the rows of A are expert-major [expert · rank, inputs], the columns of B rank-major [outputs, rank · expert].
Two parameters of one module are told apart by their shapes: PEFT's names only say which was wrapped first. Where PEFT
took the experts for [expert, outputs, inputs], as it does unless they say is_transposed, the factors have changed
places; that is refused by their shapes, which only `down` of a d_mlp equal to d_model, adapted alone, does not show.

The experts' GPU kernel reads packed weights only: experts with an adapter run on the torch path, on every device.

Reference: LoRA, arXiv 2106.09685; PEFT 0.21, tuners/lora/layer.py, ParamWrapper.get_delta_weight.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.model.checkpoint import Checkpoint
from workbench.model.config import Config
from workbench.model.low_rank import LowRank
from workbench.model.names import name_in, shapes
from workbench.model.safetensors_file import SafetensorsFile
from workbench.model.transformer import GptOss

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.router", "mlp.experts.gate_up", "mlp.experts.down")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_FLOATS = ("BF16", "F16", "F32")

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# What adapts which module shows in the tensors; the rest is training's business or a name.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type",
}  # fmt: skip
# Other starts (PiSSA, OLoRA, LoftQ, CorDA, …) change the base weights that the adapter belongs to.
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva")}


@dataclass(frozen=True)
class Adapter:
    """What `load_adapter` attached: where it came from, the parts it adapts, and the checkpoint as it was before."""

    path: Path
    parts: tuple[str, ...]
    base: Checkpoint | None


@dataclass(frozen=True)
class _Target:
    """A matrix that can be adapted: its name here, the key that PEFT's patterns match, and its sizes."""

    part: str
    key: str
    experts: int
    inputs: int
    outputs: int


def load_adapter(model: GptOss, folder: str | Path) -> Adapter:
    """Attach the LoRA adapter in a PEFT folder to a model; it acts until `unload_adapter`.

    Everything is checked before the first part is touched. While it is attached the digest of `model.checkpoint`
    covers the adapter too, so that what is recorded with it is not taken for the base model's.
    """
    if model.adapter is not None:
        raise InputError(f"the model already has the adapter {model.adapter.path}: unload it first")
    path = Path(folder)
    config = _read_config(path)
    file = _open_weights(path)
    pairs = _pairs(file, _targets(model.cfg))
    updates = {target.part: _update(file, pair, target, config) for target, pair in pairs.items()}
    for part, update in updates.items():
        module = model.get_submodule(part)
        module.lora = update.to(next(module.parameters()).device, model.dtype)
    model.adapter = Adapter(path, tuple(updates), model.checkpoint)
    if model.checkpoint is not None:
        model.checkpoint = replace(model.checkpoint, digest=_digest(model.checkpoint, path))
    return model.adapter


def unload_adapter(model: GptOss) -> None:
    """Take the adapter off again: the model is the checkpoint's, bit for bit."""
    if model.adapter is None:
        raise InputError("the model has no adapter to unload")
    for part in model.adapter.parts:
        model.get_submodule(part).lora = None
    model.checkpoint, model.adapter = model.adapter.base, None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {_CONFIG}: name a folder that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{path}: peft_type {kind!r} is not read here, only 'LORA'")
    for name, value in config.items():
        if name in _READ | _HARMLESS or (name not in _NEUTRAL and not value):
            continue
        if value not in _NEUTRAL.get(name, ()):
            raise InputError(
                f"{path}: option {name} = {value!r} is not read here: the adapter may compute something else"
            )
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name} is {value!r}, wanted module patterns and their values")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{path}: {name} has {pattern!r}, which is no pattern: {error}") from error
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise InputError(f"{path}: rank {rank!r}, wanted a positive whole number")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(f"{path}: lora_alpha {alpha!r}, wanted a number")


def _open_weights(folder: Path) -> SafetensorsFile:
    path = folder / _WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder}: adapter_model.bin is a pickle, which can run code when it is read; save it as safetensors"
        )
    return SafetensorsFile.open(path)


def _targets(cfg: Config) -> dict[str, list[_Target]]:
    """PEFT's module name → what can be adapted in it: two matrices in the experts, else one."""
    targets: dict[str, list[_Target]] = {}
    wanted = shapes(cfg, "dense")
    for layer in range(cfg.n_layers):
        for part in (f"blocks.{layer}.{name}" for name in _PARTS):
            parameter, shape = name_in("huggingface", f"{part}.weight"), wanted[f"{part}.weight"]
            module = parameter.rpartition(".")[0]
            key = module if ".attn." in part else parameter  # the router is no linear module in transformers
            sizes = shape if len(shape) == 3 else (1, *reversed(shape))
            targets.setdefault(module, []).append(_Target(part, key, *sizes))
    return targets


def _pairs(file: SafetensorsFile, targets: Mapping[str, list[_Target]]) -> dict[_Target, dict[str, str]]:
    """For each adapted matrix the stored names of its factors A and B."""
    modules: dict[str, dict[str, str]] = {}
    for name in file.entries:
        if not (match := _FACTOR.fullmatch(name)):
            raise InputError(f"{file.path}: tensor {name!r} is not a LoRA factor")
        modules.setdefault(match["module"], {})[match["factor"]] = name
    if not modules:
        raise InputError(f"{file.path} holds no LoRA factor")
    pairs: dict[_Target, dict[str, str]] = {}
    for module, pair in modules.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{file.path}: {module!r} has lora_{next(iter(pair))} without its other factor")
        target = _target(file, module, pair, targets)
        if target in pairs:
            raise InputError(f"{file.path}: {target.part} is adapted twice, the second time by {module!r}")
        pairs[target] = pair
    return pairs


def _target(
    file: SafetensorsFile, module: str, pair: Mapping[str, str], targets: Mapping[str, list[_Target]]
) -> _Target:
    here = targets.get(re.sub(r"(\.base_layer)+$", "", module))
    if here is None:
        names = list(targets)
        raise InputError(
            f"{file.path}: {module!r} cannot be adapted in this model: it has {names[0]!r} and so on to {names[-1]!r}"
        )
    a, b = (file.entries[pair[factor]].shape for factor in "AB")
    for target in here:
        if (a[1:], b[:1]) == ((target.inputs,), (target.outputs,)):
            return target
    wanted = " or ".join(f"{target.inputs} to {target.outputs}" for target in here)
    raise InputError(f"{file.path}: {module!r} has factors A {list(a)} and B {list(b)}, the model maps {wanted}")


def _update(file: SafetensorsFile, pair: Mapping[str, str], target: _Target, config: Mapping[str, Any]) -> LowRank:
    rank = _by_pattern(config.get("rank_pattern"), target.key, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), target.key, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    wanted = {"A": (target.experts * rank, target.inputs), "B": (target.outputs, rank * target.experts)}
    for factor, name in pair.items():
        entry = file.entries[name]
        if entry.shape != wanted[factor]:
            raise InputError(
                f"{file.path}: tensor {name!r} has shape {list(entry.shape)}, the model and the rank want "
                f"{list(wanted[factor])}"
            )
        if entry.dtype not in _FLOATS:
            raise InputError(f"{file.path}: tensor {name!r} has dtype {entry.dtype}, wanted {' or '.join(_FLOATS)}")
    a, b = (file.tensor(pair[factor]).float() for factor in "AB")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError(f"{file.path}: the factors of {target.part} are not finite")
    a, b = a.unflatten(0, (target.experts, rank)).mT, b.unflatten(1, (rank, target.experts)).permute(2, 1, 0) * scale
    if "experts" not in target.part:
        a, b = a[0], b[0]
    return LowRank(a.contiguous(), b.contiguous())


def _by_pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first pattern that the end of the key matches, from a dot on."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", key))
    return next(found, default)


def _digest(base: Checkpoint, folder: Path) -> str:
    """Fingerprint of a checkpoint and the adapter on it."""
    total = hashlib.sha256(base.digest.encode())
    for name in (_CONFIG, _WEIGHTS):
        total.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()
