"""LoRA adapters in PEFT's folder format, applied beside weights that stay packed and untouched.

A folder holds adapter_config.json and adapter_model.safetensors. An adapted matrix W of inputs by outputs becomes
W + alpha / rank · Aᵀ · Bᵀ, computed as x · W + (x · Aᵀ) · Bᵀ · alpha / rank. Linear maps have A [rank, inputs] and
B [outputs, rank]. PEFT reaches the experts as parameters [expert, inputs, outputs] and stacks their pairs in one matrix
each: the rows of A are expert-major [expert · rank, inputs], the columns of B rank-major [outputs, rank · expert].
Two parameters of one module are distinguished by their shapes: PEFT's names only state which was wrapped first. Where
PEFT took the experts for [expert, outputs, inputs], as it does unless they say is_transposed, the factors have changed
places; that is refused by their shapes, which only `down` of a d_mlp equal to d_model, adapted alone, does not show.

Weights that the adapter replaces (`modules_to_save`, and DoRA, whose magnitudes rescale the rows of W + update) are
exchanged while it is attached and restored afterwards. The experts' GPU kernel reads packed weights only: experts with
an adapter run on the torch path, on every device.

Reference: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; PEFT 0.21, tuners/lora/layer.py,
ParamWrapper.get_delta_weight.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.model.adapter_config import CONFIG, expert_layout, rank_and_scale, read_adapter_config
from workbench.model.adapter_names import Target, module_name, targets, targets_of
from workbench.model.low_rank import LowRank
from workbench.model.names import name_in
from workbench.model.opened_checkpoint import Checkpoint
from workbench.model.safetensors_file import FLOATS, SafetensorsFile
from workbench.model.transformer import GptOss

WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?P<factor>[AB])(\.\w+)?\.weight")
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(\.default)?(\.weight)?")
_WRAPPERS = re.compile(r"\.(modules_to_save|default|base_layer)(?=\.|$)")


@dataclass(frozen=True)
class Adapter:
    """What `load_adapter` attached: where it came from, the parts it adapts, and the checkpoint as it was before.

    replaced: the parameters that it exchanged, by name, as they were.
    """

    path: Path
    parts: tuple[str, ...]
    base: Checkpoint | None
    replaced: Mapping[str, nn.Parameter] = field(default_factory=dict)


class _Pair(NamedTuple):
    """The factors of one module, float32, with the scale in b; stacked where one module holds all experts."""

    target: Target
    a: Float[Tensor, "expert inputs rank"]
    b: Float[Tensor, "expert rank outputs"]


def load_adapter(model: GptOss, folder: str | Path) -> Adapter:
    """Attach the LoRA adapter in a PEFT folder to a model; it acts until `unload_adapter`.

    Everything is checked before the first part is touched. While it is attached the digest of `model.checkpoint`
    covers the adapter too, so that what is recorded with it is not taken for the base model's.

    Raises:
        InputError: the folder is damaged, does not fit the model, or has an option that is not computed here.
    """
    if model.adapter is not None:
        raise InputError(f"the model already has the adapter {model.adapter.path}: unload it first")
    path = Path(folder)
    config = read_adapter_config(path)
    file = _open_weights(path)
    pairs = _read_pairs(file, config, targets(model.cfg))
    replacements = _saved_weights(model, file, config)
    scaled = _dora(model, file, config, pairs, replacements)
    updates = {part: _combine(own) for part, own in _by_part(pairs).items() if f"{part}.weight" not in scaled}
    for part, update in updates.items():
        module = model.get_submodule(part)
        module.lora = update.to(next(module.parameters()).device, model.dtype)
    replaced = {name: _exchange(model, name, weight) for name, weight in (replacements | scaled).items()}
    model.adapter = Adapter(path, tuple(updates), model.checkpoint, replaced)
    if model.checkpoint is not None:
        model.checkpoint = replace(model.checkpoint, digest=_digest(model.checkpoint, path))
    return model.adapter


def unload_adapter(model: GptOss) -> None:
    """Remove the adapter: the weights are those of the checkpoint again, bit for bit.

    Raises:
        InputError: the model has no adapter.
    """
    if model.adapter is None:
        raise InputError("the model has no adapter to unload")
    for part in model.adapter.parts:
        model.get_submodule(part).lora = None
    for name, parameter in model.adapter.replaced.items():
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, parameter)
    model.checkpoint, model.adapter = model.adapter.base, None


def _exchange(model: GptOss, name: str, weight: Tensor) -> nn.Parameter:
    """Give a parameter other values of the same device and dtype, and return the parameter as it was."""
    module, _, own = name.rpartition(".")
    before = model.get_parameter(name)
    after = nn.Parameter(weight.to(before.device, before.dtype), requires_grad=False)
    setattr(model.get_submodule(module), own, after)
    return before


def _open_weights(folder: Path) -> SafetensorsFile:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder}: adapter_model.bin is a pickle, which can run code when it is read; save it as safetensors"
        )
    return SafetensorsFile.open(path)


def _read_pairs(file: SafetensorsFile, config: Mapping[str, Any], known: Mapping[str, list[Target]]) -> list[_Pair]:
    """Return the factors of every adapted module."""
    modules: dict[str, dict[str, str]] = {}
    for name in file.entries:
        if match := _FACTOR.fullmatch(name):
            own = modules.setdefault(module_name(match["module"]), {})
            if other := own.get(match["factor"]):
                raise InputError(f"{file.path}: tensors {other!r} and {name!r} adapt the same module: save one adapter")
            own[match["factor"]] = name
        elif "lora_embedding" in name:
            raise InputError(f"{file.path}: tensor {name!r} adapts the embedding, which is not supported: merge it")
    if not modules and not config.get("modules_to_save"):
        raise InputError(f"{file.path} holds no LoRA factor: expected tensors such as lora_A and lora_B")
    pairs: dict[Target, _Pair] = {}
    for module, names in modules.items():
        if set(names) != {"A", "B"}:
            raise InputError(
                f"{file.path}: {module!r} has lora_{next(iter(names))} without its other factor: the file is incomplete"
            )
        target = _target(file, module, names, known)
        if target in pairs:
            raise InputError(f"{file.path}: {target.part} is adapted twice, the second time by {module!r}")
        pairs[target] = _pair(file, names, target, config)
    return list(pairs.values())


def _target(file: SafetensorsFile, module: str, names: Mapping[str, str], known: Mapping[str, list[Target]]) -> Target:
    here = targets_of(module, known)
    if not here:
        every = [name for name in known if name != "lm_head"]
        raise InputError(
            f"{file.path}: {module!r} cannot be adapted in this model: it has {every[0]!r} and so on to {every[-1]!r}"
        )
    a, b = (file.entries[names[factor]].shape for factor in "AB")
    for target in here:
        if (a[-1:], b[-2:-1]) == ((target.inputs,), (target.adapted_outputs,)):
            return target
    wanted = " or ".join(f"{target.inputs} to {target.adapted_outputs}" for target in here)
    raise InputError(f"{file.path}: {module!r} has factors A {list(a)} and B {list(b)}, the model maps {wanted}")


def _pair(file: SafetensorsFile, names: Mapping[str, str], target: Target, config: Mapping[str, Any]) -> _Pair:
    rank, scale = rank_and_scale(config, target.key)
    stack = 1 if target.expert is not None else target.experts
    three_axes = len(file.entries[names["A"]].shape) == 3
    if three_axes:  # [expert or 1, rank, inputs]; one matrix may serve all experts
        _check_factors(
            file,
            names,
            {
                "A": ((stack, rank, target.inputs), (1, rank, target.inputs)),
                "B": ((stack, target.adapted_outputs, rank), (1, target.adapted_outputs, rank)),
            },
        )
    else:
        _check_factors(
            file,
            names,
            {
                "A": ((stack * rank, target.inputs),),
                "B": ((target.adapted_outputs, rank * stack),),
            },
        )
    a, b = (file.tensor(names[factor]).float() for factor in "AB")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError(f"{file.path}: the factors of {target.part} are not finite")
    if three_axes:
        a, b = (factor.mT.expand(stack, -1, -1) for factor in (a, b))
    else:
        a = a.unflatten(0, (stack, rank)).mT
        grouped = stack > 1 and expert_layout(file.path.parent, config) == "grouped_by_expert"
        b = (
            b.unflatten(1, (stack, rank)).permute(1, 2, 0)
            if grouped
            else b.unflatten(1, (rank, stack)).permute(2, 1, 0)
        )
    return _Pair(target, a, b * scale)


def _check_factors(
    file: SafetensorsFile, names: Mapping[str, str], wanted: Mapping[str, tuple[tuple[int, ...], ...]]
) -> None:
    for factor, name in names.items():
        entry = file.entries[name]
        if entry.shape not in wanted[factor]:
            raise InputError(
                f"{file.path}: tensor {name!r} has shape {list(entry.shape)}, the model and the rank want "
                f"{list(wanted[factor][0])}"
            )
        _check_float(file, name)


def _check_float(file: SafetensorsFile, name: str) -> None:
    if (dtype := file.entries[name].dtype) not in FLOATS:
        raise InputError(f"{file.path}: tensor {name!r} has dtype {dtype}, expected {' or '.join(FLOATS)}")


def _by_part(pairs: Collection[_Pair]) -> dict[str, list[_Pair]]:
    parts: dict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        parts[pair.target.part].append(pair)
    return parts


def _combine(pairs: list[_Pair]) -> LowRank:
    """Return one update for a matrix: pairs of single experts or rows side by side, with zeros elsewhere."""
    first = pairs[0].target
    if first.experts == 1:
        return LowRank(pairs[0].a[0].contiguous(), pairs[0].b[0].contiguous())
    if len(pairs) == 1 and first.expert is None and first.adapted_outputs == first.outputs:
        return LowRank(pairs[0].a.contiguous(), pairs[0].b.contiguous())
    used = torch.zeros(first.experts, dtype=torch.long)
    places = []
    for pair in pairs:
        experts = slice(None) if pair.target.expert is None else slice(pair.target.expert, pair.target.expert + 1)
        start = int(used[experts].max())
        used[experts] = start + pair.a.shape[-1]
        places.append((pair, experts, slice(start, start + pair.a.shape[-1])))
    a = torch.zeros(first.experts, first.inputs, int(used.max()))
    b = torch.zeros(first.experts, int(used.max()), first.outputs)
    for pair, experts, ranks in places:
        a[experts, :, ranks] = pair.a
        b[experts, ranks, pair.target.columns] = pair.b
    return LowRank(a, b)


def _saved_weights(model: GptOss, file: SafetensorsFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return parameter name → the values that replace it: the modules that were trained in full."""
    names = {name_in("huggingface", name): name for name in dict(model.named_parameters())}
    packed = {name_in("huggingface", name): name for name in dict(model.named_buffers())}
    weights: dict[str, Tensor] = {}
    wanted = list(config.get("modules_to_save") or ())
    left = set(wanted)
    for stored in file.entries:
        if _FACTOR.fullmatch(stored) or _MAGNITUDE.fullmatch(stored):
            continue
        own = module_name(_WRAPPERS.sub("", stored))
        left -= {name for name in wanted if re.search(rf"(^|\.){re.escape(name)}(\.|$)", own)}
        if (name := names.get(own)) is None:
            why = "its experts are packed" if f"{own}_blocks" in packed else "it has no such weight"
            raise InputError(
                f"{file.path}: tensor {stored!r} is not a LoRA factor and cannot replace a weight of this model: {why}"
            )
        _check_float(file, stored)
        value, before = file.tensor(stored), model.get_parameter(name)
        if value.shape != before.shape:
            raise InputError(
                f"{file.path}: tensor {stored!r} has shape {list(value.shape)}, the model's {list(before.shape)}"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{file.path}: tensor {stored!r} is not finite")
        weights[name] = value
    if left:
        raise InputError(f"{file.path}: modules_to_save names {min(left)!r}, but the file holds no such tensor")
    return weights


def _dora(
    model: GptOss,
    file: SafetensorsFile,
    config: Mapping[str, Any],
    pairs: Collection[_Pair],
    replacements: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return parameter name → the weight with its update, its rows scaled to DoRA's magnitudes."""
    magnitudes = {module_name(match["module"]): name for name in file.entries if (match := _MAGNITUDE.fullmatch(name))}
    if not config.get("use_dora"):
        if magnitudes:
            raise InputError(f"{file.path}: {min(magnitudes.values())!r} is a magnitude of DoRA, but use_dora is false")
        return {}
    scaled: dict[str, Tensor] = {}
    by_part = {pair.target.part: pair for pair in pairs}
    known = targets(model.cfg)
    for module, name in magnitudes.items():
        part = next((target.part for target in targets_of(module, known)), None)
        if part is None or part not in by_part or by_part[part].target.experts > 1:
            raise InputError(f"{file.path}: DoRA is supported for attention, router and unembedding, not {module!r}")
        pair, magnitude = by_part[part], file.tensor(name).float().flatten()
        if len(magnitude) != pair.target.outputs or not torch.isfinite(magnitude).all():
            raise InputError(
                f"{file.path}: {name!r} has {len(magnitude)} magnitudes, {pair.target.outputs} finite ones are expected"
            )
        base = replacements.get(f"{part}.weight", model.get_parameter(f"{part}.weight"))
        weight = base.float().cpu() + (pair.a[0] @ pair.b[0]).mT
        scaled[f"{part}.weight"] = weight * (magnitude / weight.norm(dim=1))[:, None]
    if lacking := sorted(set(by_part) - {name.removesuffix(".weight") for name in scaled}):
        raise InputError(f"{file.path}: use_dora is true, but {lacking[0]} has no lora_magnitude_vector")
    return scaled


def _digest(base: Checkpoint, folder: Path) -> str:
    """Return the fingerprint of a checkpoint and the adapter on it."""
    total = hashlib.sha256(base.digest.encode())
    for name in (CONFIG, WEIGHTS):
        total.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()
