"""Read a model's configuration from a checkpoint. No size is assumed, and unknown fields are errors.

Two formats are read: Hugging Face's `config.json` (model_type gpt_oss; rope parameters as published or as
transformers 5 writes them) and OpenAI's original one. Both become the same `Config`, with the names of TransformerLens.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.model.config_names import ConfigNames

GROUP = 32  # values that share an MXFP4 scale: widths are multiples of it


@dataclass(frozen=True)
class Rope:
    """Rotary position parameters; `factor` None means RoPE without YaRN."""

    theta: float
    factor: float | None
    beta_fast: float
    beta_slow: float
    original_ctx: int
    truncate: bool

    @classmethod
    def plain(cls, theta: float) -> "Rope":
        """Return whether this is RoPE without YaRN; the numbers after `factor` are then unused."""
        return cls(theta, None, 32.0, 1.0, 4096, False)


@dataclass(frozen=True)
class Config(ConfigNames):
    """Sizes and constants of a model. `windows`: the number of keys a query attends to in each layer, itself included;
    None means full attention. `layer_experts`: the number of experts of each layer, where layers differ, as in pruned
    models; `num_experts` is then the largest.
    """

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
    layer_experts: tuple[int, ...] | None = None

    def experts_of(self, layer: int) -> int:
        """Return the number of experts of a layer."""
        return self.num_experts if self.layer_experts is None else self.layer_experts[layer]

    @property
    def all_experts(self) -> int:
        """Return the number of experts of all layers together."""
        return sum(self.experts_of(layer) for layer in range(self.n_layers))

    def of(self, model: Any) -> "Config":
        """Return the config of a model, which also has its device and dtype."""
        own = replace(self)
        object.__setattr__(own, "_model", model)  # no field: two configs are equal wherever their models are
        return own

    @property
    def n_params(self) -> int:
        """Return the number of parameters, experts counted unpacked."""
        return self._outside_experts + self.all_experts * self._expert

    @property
    def n_active_params(self) -> int:
        """Return the number of parameters used for one token: its experts and the unembedding, not the embedding."""
        used = self.n_layers * self.experts_per_token * self._expert
        return self._outside_experts - self.d_vocab * self.d_model + used

    @property
    def _expert(self) -> int:
        return 3 * self.d_model * self.d_mlp + 2 * self.d_mlp + self.d_model

    @property
    def _outside_experts(self) -> int:
        q, kv = self.n_heads * self.d_head, self.n_key_value_heads * self.d_head
        attention = self.d_model * (2 * q + 2 * kv) + q + 2 * kv + self.d_model + self.n_heads
        routers = self.all_experts * (self.d_model + 1)
        layer = attention + 2 * self.d_model
        return 2 * self.d_vocab * self.d_model + self.d_model + self.n_layers * layer + routers

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a run's attributes."""
        values = asdict(self) | {"windows": list(self.windows)}
        if self.layer_experts is None:  # as in runs that were begun before there was this field
            del values["layer_experts"]
            return values
        return values | {"layer_experts": list(self.layer_experts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """Return the config from the values of `to_json`."""
        read = {"windows": tuple(values["windows"]), "rope": Rope(**values["rope"])}
        if values.get("layer_experts") is not None:
            read["layer_experts"] = tuple(values["layer_experts"])
        return cls(**{**values, **read})


def _published(n_layers: int, num_experts: int) -> Config:
    return Config(
        d_model=2880,
        n_layers=n_layers,
        n_heads=64,
        n_key_value_heads=8,
        d_head=64,
        d_mlp=2880,
        d_vocab=201_088,
        num_experts=num_experts,
        experts_per_token=4,
        windows=(128, None) * (n_layers // 2),
        n_ctx=131_072,
        eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        rope=Rope(theta=150_000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, original_ctx=4096, truncate=False),
    )


# The config.json of openai/gpt-oss-20b and -120b; for random models, plans and timings. Real ones are read.
PUBLISHED = {"20b": _published(24, 32), "120b": _published(36, 128)}

# Fields that change no logit: names, training settings, and the settings of generation that transformers' releases
# before 5 write into every config.
_INERT = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_dir",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}
# Fields that change nothing at these values and could at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
}
_NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {
    "apply_yarn_scaling": (True,),
    "attn_factor": (1.0,),
    "extrapolation_factor": (1.0,),
    "mscale": (1.0,),
    "mscale_all_dim": (0.0,),
    "partial_rotary_factor": (1.0,),
}
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


class _Fields:
    """The fields of a config, each read once. Fields that were not read are unknown.

    Null is the same as absent, but for `default_if_absent`.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        self.path, self.where = path, where
        self.values = {name: value for name, value in values.items() if value is not None}
        self.nulls = {name for name, value in values.items() if value is None}
        self.nested: list[_Fields] = []  # objects whose unknown fields `finish` reports too

    def default_if_absent(self, name: str, default: Any) -> Any:
        """Return the default that a field has when it is absent; a field that is null has none and is required."""
        return ... if name in self.nulls else default

    def take(self, *names: str, default: Any = ...) -> Any:
        """Return the value of the first field among `names` that is present; several of them must agree."""
        found = {name: self.values.pop(name) for name in names if name in self.values}
        if not found and default is ...:
            raise InputError(
                f"{self.path}: field {self.where}{names[0]!r} is missing; the model cannot be built without it"
            )
        if any(value != first for first, value in pairwise(found.values())):
            description = " and ".join(f"{self.where}{name} {short(value)}" for name, value in found.items())
            raise InputError(f"{self.path}: {description} contradict each other; correct one of them")
        return next(iter(found.values()), default)

    def integer(self, *names: str, most: int = 1_000_000_000, default: Any = ...) -> int:
        value = self.take(*names, default=default)
        if type(value) is not int or not 1 <= value <= most:
            raise self._refusal(names[0], value, f"a whole number from 1 to {most:,}")
        return value

    def number(self, *names: str, default: Any = ...) -> float:
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._refusal(names[0], value, "a number above 0")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.take(name, default=default)
        if not isinstance(value, bool):
            raise self._refusal(name, value, "true or false")
        return value

    def fields(self, *names: str, where: str) -> "_Fields":
        """Return the fields of a nested object."""
        value = self.take(*names)
        if not isinstance(value, dict):
            raise self._refusal(names[0], value, "an object of fields")
        return _Fields(self.path, value, where)

    def finish(self, ignore: Collection[str]) -> None:
        """Refuse the fields that were not read, all of them in one message.

        Raises:
            InputError: a field is neither known to be harmless nor in `ignore`.
        """
        unknown = [
            (part.where, name, value)
            for part in (self, *self.nested)
            for name, value in part.values.items()
            if not part._is_harmless(name, value, ignore)
        ]
        if unknown:
            listed = ", ".join(f"{where}{name!r} = {short(value)}" for where, name, value in unknown)
            subject = f"fields {listed} are" if len(unknown) > 1 else f"field {listed} is"
            options = " ".join(f"--ignore-field {name}" for _, name, _ in unknown)
            raise InputError(
                f"{self.path}: {subject} unknown and could change the mathematics; "
                f"if not, load with ignore_fields={[name for _, name, _ in unknown]} or {options}"
            )

    def _is_harmless(self, name: str, value: Any, ignore: Collection[str]) -> bool:
        if name in ignore or name.startswith("_"):
            return True
        neutral = _NEUTRAL_ROPE if self.where else _NEUTRAL
        return value in neutral[name] if name in neutral else not self.where and name in _INERT

    def _refusal(self, name: str, value: object, wanted: str) -> InputError:
        return InputError(f"{self.path}: {self.where}{name} is {short(value)}, wanted {wanted}")


def read_config(folder: Path, ignore_fields: Collection[str] = ()) -> Config:
    """Return the config of a checkpoint folder in either format.

    Raises:
        InputError: a field is missing, unknown, contradictory, or has a value that is not supported.
    """
    path = folder / "config.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json: it is not a checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, wanted an object of fields")
    fields = _Fields(path, values)
    original = "num_experts" in values and "model_type" not in values
    cfg = _original(fields) if original else _hugging_face(fields)
    fields.finish(ignore_fields)
    return check_sizes(path, cfg)


def _hugging_face(fields: _Fields) -> Config:
    kind = fields.values.get("model_type")
    if kind not in ("gpt_oss", "gpt_oss_puzzle"):
        raise InputError(f"{fields.path}: model_type is {short(kind)}, wanted 'gpt_oss' or 'gpt_oss_puzzle'")
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


def _layer_experts(fields: _Fields, n_layers: int) -> tuple[int, ...]:
    """Return the number of experts of each layer from one number for all, or a list with one for each."""
    value = fields.take("num_local_experts", "num_experts")
    experts = value if isinstance(value, list) else [value] * n_layers
    if len(experts) != n_layers or not all(type(one) is int and 1 <= one <= _MOST_EXPERTS for one in experts):
        raise fields._refusal(
            "num_local_experts", value, f"a whole number from 1 to {_MOST_EXPERTS:,}, or {n_layers} of them"
        )
    return tuple(experts)


def _block_configs(fields: _Fields, n_layers: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Return experts and window of each layer from `block_configs`, as nvidia/gpt-oss-puzzle-88B has them.

    The top-level fields are those of the model that it was made from, and yield to the blocks' own.
    """
    for name in ("num_local_experts", "num_experts", "sliding_window"):
        fields.take(name, default=None)
    value = fields.take("block_configs")
    if not isinstance(value, list) or len(value) != n_layers or not all(isinstance(block, dict) for block in value):
        raise fields._refusal("block_configs", value, f"a list of {n_layers} objects, one for each layer")
    blocks = [_Fields(fields.path, block, f"block_configs[{layer}].") for layer, block in enumerate(value)]
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


def _head_dim(fields: _Fields) -> Any:
    """Return the head size that transformers uses when the field is absent or null."""
    if "head_dim" not in fields.nulls:
        return _HEAD_DIM
    d_model, heads = fields.values.get("hidden_size"), fields.values.get("num_attention_heads")
    return d_model // heads if isinstance(d_model, int) and isinstance(heads, int) and heads > 0 else None


def _sizes(fields: _Fields) -> dict[str, Any]:
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


def _windows(fields: _Fields, n_layers: int) -> tuple[int | None, ...]:
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


def _hugging_face_rope(fields: _Fields) -> Rope:
    names = {"rope_parameters", "rope_scaling"}
    if not names & set(fields.values):
        if null := names & fields.nulls:
            raise InputError(
                f"{fields.path}: {min(null)} is null, which some releases of transformers read as YaRN and others as "
                "plain rotary positions; write out the parameters"
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


def _original(fields: _Fields) -> Config:
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


def check_sizes(path: Path, cfg: Config) -> Config:
    """Return the config if its sizes are consistent with each other.

    Raises:
        InputError: they are not.
    """
    for name in ("d_model", "d_mlp"):
        if getattr(cfg, name) % GROUP:
            raise InputError(f"{path}: {name} is {getattr(cfg, name)}; MXFP4 needs a multiple of {GROUP}")
    if cfg.n_heads % cfg.n_key_value_heads:
        raise InputError(
            f"{path}: {cfg.n_heads} query heads cannot share {cfg.n_key_value_heads} key-value heads evenly"
        )
    if cfg.d_head % 2:
        raise InputError(f"{path}: d_head is {cfg.d_head}; rotary positions need an even number")
    if cfg.rope.theta <= 1 or (cfg.rope.factor or 1) < 1 or cfg.rope.beta_fast <= cfg.rope.beta_slow:
        raise InputError(
            f"{path}: {cfg.rope} wants theta above 1, a factor of at least 1, and beta_fast above beta_slow"
        )
    fewest = min(cfg.layer_experts or (cfg.num_experts,))
    if cfg.experts_per_token > fewest:
        layer = "" if cfg.layer_experts is None else f" in layer {cfg.layer_experts.index(fewest)}"
        raise InputError(f"{path}: a token goes to {cfg.experts_per_token} experts, but there are {fewest}{layer}")
    return cfg
