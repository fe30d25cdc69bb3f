"""Read a model's configuration from a checkpoint. Unknown fields are errors.

Two formats are read: Hugging Face's `config.json` (model_type gpt_oss; rope parameters as published or as
transformers 5 writes them) and OpenAI's original one. Both become the same `Config`.
"""

import math
from collections.abc import Collection
from pathlib import Path
from reprlib import repr as short
from typing import Any

from workbench.bounded_json import read_json, unique_names
from workbench.errors import InputError
from workbench.model.config import Config, Rope, check_sizes
from workbench.model.config_fields import ConfigFields

# What these must be for our forward pass to be the model's; absent means the same, as in transformers.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": True}
# What transformers' GptOssConfig assumes for fields that are absent.
_ROPE_THETA, _HEAD_DIM, _SWIGLU_LIMIT = 150_000.0, 64, 7.0
_DEFAULT_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 65_536  # guards against a config that names a billion


def read_config(folder: Path, ignore_fields: Collection[str] = ()) -> Config:
    """Return the config of a checkpoint folder in either format.

    Raises:
        InputError: a field is missing, unknown, contradictory, or has a value that is not supported.
    """
    path = folder / "config.json"
    try:
        values = read_json(path, object_pairs_hook=unique_names)
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json: it is not a checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected an object of fields")
    fields = ConfigFields(path, values)
    original = "num_experts" in values and "model_type" not in values
    cfg = _original(fields) if original else _hugging_face(fields)
    fields.finish(ignore_fields)
    return check_sizes(path, cfg)


def _hugging_face(fields: ConfigFields) -> Config:
    kind = fields.values.get("model_type")
    if kind not in ("gpt_oss", "gpt_oss_puzzle"):
        raise InputError(f"{fields.path}: model_type is {short(kind)}, expected 'gpt_oss' or 'gpt_oss_puzzle'")
    for name, computed in _FIXED.items():
        if (value := fields.take(name, default=computed)) != computed:
            raise InputError(f"{fields.path}: {name} is {short(value)}; this project computes {computed!r} only")
    if "quantization" in fields.values:  # MLX's, which it writes under both names; the tensors tell what is quantised
        fields.take("quantization")
        fields.take("quantization_config", default=None)
    if "quantization_config" in fields.values:
        method = fields.fields("quantization_config", where="quantization_config.").values.get("quant_method")
        if method != "mxfp4":
            raise InputError(f"{fields.path}: quantisation {short(method)} is not read, only 'mxfp4' and none")
    fields.boolean("tie_word_embeddings", default=False)  # see `ties_embeddings`
    if "num_experts_per_tok" in fields.values:  # transformers reads this one, and openai's publication holds both
        fields.values.pop("experts_per_token", None)
    n_layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    fields.values.setdefault("head_dim", _head_dim(fields))
    blocks = "block_configs" in fields.values or kind == "gpt_oss_puzzle"
    experts, windows = _block_configs(fields, n_layers) if blocks else (_layer_experts(fields, n_layers), None)
    return Config(
        **_sizes(fields),
        n_layers=n_layers,
        num_experts=max(experts),
        layer_experts=experts if len(set(experts)) > 1 else None,
        experts_per_token=fields.integer("num_experts_per_tok", "experts_per_token"),
        windows=_windows(fields, n_layers) if windows is None else windows,
        n_ctx=fields.integer("max_position_embeddings"),
        eps=fields.number("rms_norm_eps"),
        swiglu_limit=fields.number("swiglu_limit", default=fields.default_if_absent("swiglu_limit", _SWIGLU_LIMIT)),
        swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
        rope=_hugging_face_rope(fields),
    )


def _layer_experts(fields: ConfigFields, n_layers: int) -> tuple[int, ...]:
    """Return the number of experts of each layer from one number for all, or a list with one for each."""
    value = fields.take("num_local_experts", "num_experts")
    experts = value if isinstance(value, list) else [value] * n_layers
    if len(experts) != n_layers or not all(type(one) is int and 1 <= one <= _MOST_EXPERTS for one in experts):
        raise fields.refusal(
            "num_local_experts", value, f"a whole number from 1 to {_MOST_EXPERTS:,}, or {n_layers} of them"
        )
    return tuple(experts)


def _block_configs(fields: ConfigFields, n_layers: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Return experts and window of each layer from `block_configs`, as nvidia/gpt-oss-puzzle-88B has them.

    The top-level fields are those of the model that it was made from, and yield to the blocks' own.
    """
    for name in ("num_local_experts", "num_experts", "sliding_window"):
        fields.take(name, default=None)
    value = fields.take("block_configs")
    if not isinstance(value, list) or len(value) != n_layers or not all(isinstance(block, dict) for block in value):
        raise fields.refusal("block_configs", value, f"a list of {n_layers} objects, one for each layer")
    blocks = [ConfigFields(fields.path, block, f"block_configs[{layer}].") for layer, block in enumerate(value)]
    fields.nested += blocks
    experts = tuple(block.integer("num_local_experts", most=_MOST_EXPERTS) for block in blocks)
    windows = tuple(
        None if "sliding_window" in block.nulls else block.integer("sliding_window", most=_MOST_LAYERS * 1_000)
        for block in blocks
    )
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if (types := fields.take("layer_types", default=kinds)) != kinds:
        raise InputError(f"{fields.path}: layer_types {short(types)} contradict the sliding_window of block_configs")
    return experts, windows


def _head_dim(fields: ConfigFields) -> Any:
    """Return the head size that transformers uses when the field is absent or null."""
    if "head_dim" not in fields.nulls:
        return _HEAD_DIM
    d_model, heads = fields.values.get("hidden_size"), fields.values.get("num_attention_heads")
    return d_model // heads if isinstance(d_model, int) and isinstance(heads, int) and heads > 0 else None


def _sizes(fields: ConfigFields) -> dict[str, Any]:
    """Return the sizes that both formats name alike."""
    names = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_key_value_heads": "num_key_value_heads",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size",
    }
    return {ours: fields.integer(theirs) for ours, theirs in names.items()}


def _windows(fields: ConfigFields, n_layers: int) -> tuple[int | None, ...]:
    sliding, full = "sliding_attention", "full_attention"
    kinds = fields.take("layer_types", default=[full if layer % 2 else sliding for layer in range(n_layers)])
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in (sliding, full) for kind in kinds):
        raise InputError(
            f"{fields.path}: layer_types needs one of {[full, sliding]} for each of {n_layers} layers, got "
            f"{short(kinds)}"
        )
    if sliding in kinds:
        window = fields.integer("sliding_window", default=fields.default_if_absent("sliding_window", 128))
    else:
        window = fields.take("sliding_window", default=None)
    return tuple(window if kind == sliding else None for kind in kinds)


def _hugging_face_rope(fields: ConfigFields) -> Rope:
    names = {"rope_parameters", "rope_scaling"}
    if not names & set(fields.values):
        if null := names & fields.nulls:
            raise InputError(
                f"{fields.path}: {min(null)} is null, which some releases of transformers read as YaRN and others as "
                "plain rotary positions: state the parameters in the config"
            )
        fields.values["rope_parameters"] = dict(_DEFAULT_YARN)
    rope = fields.fields("rope_parameters", "rope_scaling", where="rope_parameters.")
    # Published configs say these beside the rope's own fields, transformers 5 among them.
    rope.values |= {
        f"../{n}": fields.values.pop(n) for n in ("rope_theta", "initial_context_length") if n in fields.values
    }
    theta = rope.number("rope_theta", "../rope_theta", default=fields.default_if_absent("rope_theta", _ROPE_THETA))
    kind = rope.take("rope_type", "type", default="default")
    factor, wanted = rope.values.get("factor"), 1.0
    if kind == "yarn" and isinstance(factor, int | float) and factor >= 1:
        wanted = 0.1 * math.log(factor) + 1.0
    attention_factor = rope.number("attention_factor", default=wanted)
    if not math.isclose(attention_factor, wanted, rel_tol=1e-6):
        raise InputError(
            f"{fields.path}: rope_parameters.attention_factor is {attention_factor}; only the default of this rope, "
            f"{wanted:.7g}, is computed here"
        )
    if kind == "default":
        for name in ("../initial_context_length", "original_max_position_embeddings"):
            rope.take(name, default=None)
        if rope.values.get("factor") == 1:
            rope.take("factor")
        read = Rope.plain(theta)
    elif kind == "yarn":
        if "original_max_position_embeddings" not in rope.values:
            # transformers does not read initial_context_length in its place, but max_position_embeddings
            rope.take("original_max_position_embeddings")
        read = Rope(
            theta=theta,
            factor=rope.number("factor"),
            beta_fast=rope.number("beta_fast", default=32.0),
            beta_slow=rope.number("beta_slow", default=1.0),
            original_ctx=rope.integer("original_max_position_embeddings", "../initial_context_length"),
            truncate=rope.boolean("truncate", default=True),
        )
    else:
        raise InputError(f"{fields.path}: rope_type {short(kind)} is not computed here, only 'yarn' and 'default'")
    fields.nested.append(rope)
    return read


def ties_embeddings(folder: Path) -> bool:
    """Return whether the config of a checkpoint folder declares the unembedding to be the embedding."""
    return read_json(folder / "config.json").get("tie_word_embeddings") is True


def _original(fields: ConfigFields) -> Config:
    n_layers, sliding = fields.integer("num_hidden_layers", most=_MOST_LAYERS), fields.integer("sliding_window")
    original_ctx, factor = fields.integer("initial_context_length"), fields.number("rope_scaling_factor")
    yarn = Rope(
        theta=fields.number("rope_theta"),
        factor=factor,
        beta_fast=fields.number("rope_ntk_beta"),
        beta_slow=fields.number("rope_ntk_alpha"),
        original_ctx=original_ctx,
        truncate=False,
    )
    return Config(
        **_sizes(fields),
        n_layers=n_layers,
        num_experts=fields.integer("num_experts"),
        experts_per_token=fields.integer("experts_per_token"),
        windows=tuple(sliding if layer % 2 == 0 else None for layer in range(n_layers)),
        n_ctx=round(original_ctx * max(factor, 1.0)),
        eps=1e-5,  # this and alpha are constants of the reference implementation; its config has no such fields
        swiglu_limit=fields.number("swiglu_limit"),
        swiglu_alpha=1.702,
        rope=yarn if factor > 1 else Rope.plain(yarn.theta),
    )
