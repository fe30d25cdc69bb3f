"""A model's numbers, read from a checkpoint's config: nothing about gpt-oss is assumed, nothing unknown is ignored.

Two spellings are read: Hugging Face's `config.json` (model_type gpt_oss; rope as published and as transformers 5
writes it) and OpenAI's original one. Both become the same `Config`, in TransformerLens' names.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError

GROUP = 32  # values that share an MXFP4 scale: widths are multiples of it


@dataclass(frozen=True)
class Rope:
    """Rotary positions; `factor` None is RoPE without YaRN."""

    theta: float
    factor: float | None
    beta_fast: float
    beta_slow: float
    original_ctx: int
    truncate: bool


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model. `windows`: keys a query sees in each layer, itself included; None is all."""

    d_model: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    num_experts: int
    experts_per_token: int
    windows: tuple[int | None, ...]
    n_ctx: int
    eps: float
    swiglu_limit: float
    swiglu_alpha: float
    rope: Rope

    @property
    def n_params(self) -> int:
        """All parameters, the experts counted unpacked."""
        return self._outside_experts + self.n_layers * self.num_experts * self._expert

    @property
    def n_active_params(self) -> int:
        """What one token's forward pass multiplies with: its own experts, and the unembedding but not the embedding."""
        used = self.n_layers * self.experts_per_token * self._expert
        return self._outside_experts - self.d_vocab * self.d_model + used

    @property
    def _expert(self) -> int:
        return 3 * self.d_model * self.d_mlp + 2 * self.d_mlp + self.d_model

    @property
    def _outside_experts(self) -> int:
        q, kv = self.n_heads * self.d_head, self.n_key_value_heads * self.d_head
        attention = self.d_model * (2 * q + 2 * kv) + q + 2 * kv + self.d_model + self.n_heads
        router = self.num_experts * (self.d_model + 1)
        layer = attention + router + 2 * self.d_model
        return 2 * self.d_vocab * self.d_model + self.d_model + self.n_layers * layer

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a run's attributes."""
        return asdict(self) | {"windows": list(self.windows)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_json`."""
        return cls(**{**values, "windows": tuple(values["windows"]), "rope": Rope(**values["rope"])})


# Fields that change nothing we compute: names, training settings, and what generation reads elsewhere.
_INERT = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "cache_dir", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type", "name_or_path",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "return_dict",
    "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# What each of these must be for our forward pass to be the model's: field → accepted values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (True,),
    "tie_word_embeddings": (False,),
    "mlp_bias": (True,),
}


class _Fields:
    """A config's fields, each read once; what is left over at the end is unknown."""

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        self.path, self.values, self.where = path, dict(values), where

    def take(self, *names: str, default: Any = ...) -> Any:
        """The first of `names` that is there and not null."""
        found = [self.values.pop(name, None) for name in names]
        value = next((v for v in found if v is not None), default)
        if value is ...:
            raise InputError(
                f"{self.path}: field {self.where}{names[0]!r} is missing; the model cannot be built without it"
            )
        return value

    def integer(self, *names: str, least: int = 1) -> int:
        value = self.take(*names)
        if type(value) is not int or value < least:
            raise InputError(
                f"{self.path}: {self.where}{names[0]} is {value!r}, wanted a whole number of at least {least}"
            )
        return value

    def number(self, *names: str, default: Any = ...) -> float:
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{self.path}: {self.where}{names[0]} is {value!r}, wanted a number above 0")
        return float(value)

    def finish(self, ignore: Collection[str]) -> None:
        unknown = [n for n in self.values if n not in _INERT and n not in ignore and not n.startswith("_")]
        if unknown:
            raise InputError(
                f"{self.path}: field {self.where}{unknown[0]!r} = {self.values[unknown[0]]!r} is unknown and could change the "
                f"mathematics; if it does not, load with ignore_fields=({unknown[0]!r},)"
            )


def read_config(folder: Path, ignore_fields: Collection[str] = ()) -> Config:
    """The config of a checkpoint folder, in either spelling; every doubt is an InputError that names the field."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json: it is not a checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, wanted an object of fields")
    fields = _Fields(path, values)
    cfg = _original(fields) if "num_experts" in values and "model_type" not in values else _hugging_face(fields)
    fields.finish(ignore_fields)
    return _checked(path, cfg)


def _hugging_face(fields: _Fields) -> Config:
    kind = fields.values.get("model_type")
    if kind != "gpt_oss":
        raise InputError(f"{fields.path}: model_type is {kind!r}, wanted 'gpt_oss'")
    for name, accepted in _FIXED.items():
        if (value := fields.take(name, default=accepted[0])) not in accepted:
            raise InputError(f"{fields.path}: {name} is {value!r}; this project computes {accepted[0]!r} only")
    quantization = fields.take("quantization_config", default=None)
    if quantization is not None and quantization.get("quant_method") != "mxfp4":
        raise InputError(
            f"{fields.path}: quantisation {quantization.get('quant_method')!r} is not read, only 'mxfp4' and none"
        )
    n_layers, sliding = fields.integer("num_hidden_layers"), fields.integer("sliding_window")
    kinds = fields.take(
        "layer_types", default=[("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
    )
    windows = {"sliding_attention": sliding, "full_attention": None}
    if len(kinds) != n_layers or any(kind not in windows for kind in kinds):
        raise InputError(
            f"{fields.path}: layer_types needs one of {sorted(windows)} for each of {n_layers} layers, got {kinds}"
        )
    fields.take("experts_per_token", default=None)  # published beside num_experts_per_tok, the same number
    fields.take("initial_context_length", default=None)  # published, the rope's original context again
    return Config(
        d_model=fields.integer("hidden_size"),
        n_layers=n_layers,
        n_heads=fields.integer("num_attention_heads"),
        n_key_value_heads=fields.integer("num_key_value_heads"),
        d_head=fields.integer("head_dim"),
        d_mlp=fields.integer("intermediate_size"),
        d_vocab=fields.integer("vocab_size"),
        num_experts=fields.integer("num_local_experts", "num_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        windows=tuple(windows[kind] for kind in kinds),
        n_ctx=fields.integer("max_position_embeddings"),
        eps=fields.number("rms_norm_eps"),
        swiglu_limit=fields.number("swiglu_limit"),
        swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
        rope=_hugging_face_rope(fields),
    )


def _hugging_face_rope(fields: _Fields) -> Rope:
    theta = fields.take("rope_theta", default=None)
    given = fields.take("rope_parameters", "rope_scaling", default={})
    rope = _Fields(fields.path, {"rope_theta": theta, **given}, "rope_parameters.")
    theta = rope.number("rope_theta")
    kind = rope.take("rope_type", "type", default="default")
    if kind == "default":
        return Rope(theta, None, 32.0, 1.0, 4096, False)
    if kind != "yarn":
        raise InputError(f"{fields.path}: rope_type {kind!r} is not computed here, only 'yarn' and 'default'")
    read = Rope(
        theta=theta,
        factor=rope.number("factor"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        original_ctx=rope.integer("original_max_position_embeddings"),
        truncate=bool(rope.take("truncate", default=True)),
    )
    rope.finish(())
    return read


def _original(fields: _Fields) -> Config:
    n_layers, sliding = fields.integer("num_hidden_layers"), fields.integer("sliding_window")
    original_ctx, factor = fields.integer("initial_context_length"), fields.number("rope_scaling_factor")
    return Config(
        d_model=fields.integer("hidden_size"),
        n_layers=n_layers,
        n_heads=fields.integer("num_attention_heads"),
        n_key_value_heads=fields.integer("num_key_value_heads"),
        d_head=fields.integer("head_dim"),
        d_mlp=fields.integer("intermediate_size"),
        d_vocab=fields.integer("vocab_size"),
        num_experts=fields.integer("num_experts"),
        experts_per_token=fields.integer("experts_per_token"),
        windows=tuple(sliding if layer % 2 == 0 else None for layer in range(n_layers)),
        n_ctx=round(original_ctx * factor),
        eps=1e-5,  # the reference implementation's own constant; its config has no such field
        swiglu_limit=fields.number("swiglu_limit"),
        swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
        rope=Rope(
            theta=fields.number("rope_theta"),
            factor=factor if factor > 1 else None,
            beta_fast=fields.number("rope_ntk_beta"),
            beta_slow=fields.number("rope_ntk_alpha"),
            original_ctx=original_ctx,
            truncate=False,
        ),
    )


def _checked(path: Path, cfg: Config) -> Config:
    """What the numbers must be to each other."""
    for name in ("d_model", "d_mlp"):
        if getattr(cfg, name) % GROUP:
            raise InputError(f"{path}: {name} is {getattr(cfg, name)}; MXFP4 needs a multiple of {GROUP}")
    if cfg.n_heads % cfg.n_key_value_heads:
        raise InputError(
            f"{path}: {cfg.n_heads} query heads cannot share {cfg.n_key_value_heads} key-value heads evenly"
        )
    if cfg.d_head % 2:
        raise InputError(f"{path}: d_head is {cfg.d_head}; rotary positions need an even number")
    if cfg.experts_per_token > cfg.num_experts:
        raise InputError(f"{path}: a token goes to {cfg.experts_per_token} experts, but there are {cfg.num_experts}")
    return cfg
