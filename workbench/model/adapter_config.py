"""Read the adapter_config.json of a PEFT folder; options that would change what is computed are refused by name.

Unsloth stored the expert columns of lora_B grouped by expert until September 2026, with PEFT's shapes. Its newer
folders state `lora_B_layout`; a folder of Unsloth without it is ambiguous.

Reference: PEFT 0.21, tuners/lora/config.py.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.bounded_json import read_json, unique_names
from workbench.errors import InputError

CONFIG = "adapter_config.json"
LAYOUTS = ("rank_major", "grouped_by_expert")
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_dora",
    "lora_B_layout",
}
# What adapts which module shows in the tensors; the rest is training's business or a name.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "unsloth_fixed",
    "unsloth_version",
}
# Other starts (PiSSA, OLoRA, LoftQ, CorDA, …) change the base weights that the adapter belongs to.
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva")}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the options of an adapter.

    Raises:
        InputError: the file is missing or damaged, or an option has a value that is not computed here.
    """
    path = folder / CONFIG
    try:
        config = read_json(path, object_pairs_hook=unique_names)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} {_what_it_is(folder)}: give a folder that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}") from error
    if isinstance(config, dict) and "fine_tune_type" in config:
        raise InputError(
            f"{path} is of an adapter of MLX: fuse it (mlx_lm.fuse), and load the fused folder as the model"
        )
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
    _check_choices(path, config)
    return config


def _what_it_is(folder: Path) -> str:
    """Return what is wrong with a path that holds no adapter's config."""
    if folder.is_file():
        return "is a file"
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"has no {CONFIG}" + (f", but its folder {', '.join(below[:3])} has" if below else "")


def _check_choices(path: Path, config: Mapping[str, Any]) -> None:
    layout, saved = config.get("lora_B_layout"), config.get("modules_to_save") or []
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"{path}: lora_B_layout {layout!r} is unknown: expected {' or '.join(map(repr, LAYOUTS))}")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{path}: modules_to_save is {saved!r}, expected a list of module names")


def expert_layout(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the order of the columns of the experts' lora_B: PEFT's "rank_major", or "grouped_by_expert".

    Raises:
        InputError: Unsloth made the adapter and the config does not state the order.
    """
    if layout := config.get("lora_B_layout"):
        return str(layout)
    if sign := _sign_of_unsloth(config):
        raise InputError(
            f"{folder / CONFIG}: {sign} shows that Unsloth made this adapter, which stored the experts' lora_B grouped "
            "by expert until September 2026 and in PEFT's order since; set the option lora_B_layout in the file to "
            "'grouped_by_expert' or 'rank_major'"
        )
    return LAYOUTS[0]


def _sign_of_unsloth(config: Mapping[str, Any]) -> str | None:
    """Return the entry of a config that shows that Unsloth trained the adapter, or None."""
    mapping = config.get("auto_mapping")
    for name, value in {**config, **(mapping if isinstance(mapping, dict) else {})}.items():
        if "unsloth" in name.lower():
            return name
        if name == "parent_library" and "unsloth" in str(value).lower():
            return f"the library {value!r}"
    base = str(config.get("base_model_name_or_path"))
    return f"the base model {base!r}" if "unsloth" in base.lower() else None


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"{path}: {name} is {config[name]!r}, expected true or false")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name} is {value!r}, expected module patterns and their values")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{path}: {name} has {pattern!r}, which is not a pattern: {error}") from error
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise InputError(f"{path}: rank {rank!r}, expected a positive whole number")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(f"{path}: lora_alpha {alpha!r}, expected a number")


def rank_and_scale(config: Mapping[str, Any], key: str) -> tuple[int, float]:
    """Return the rank of a module and the factor of its update; `key` is the name that PEFT's patterns match."""
    rank = int(_by_pattern(config.get("rank_pattern"), key, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), key, config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """Return the value of the first pattern that the end of the key matches, from a dot on."""
    matching_values = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", key))
    return next(matching_values, default)
