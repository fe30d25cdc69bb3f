"""Read a gpt-oss config from the metadata of a GGUF file.

Constants of the architecture that no file states are the published ones: SwiGLU limit and alpha, a window in every
other layer, and a YaRN ramp that is not truncated (llama.cpp truncates it). Numbers of experts and windows may be lists
with one for each layer, as a proposed change of llama.cpp writes them for gpt-oss-puzzle-88B; a window of 0 is full
attention.

Reference: https://github.com/ggml-org/llama.cpp/pull/21032 for the lists.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.model.config import Config, Rope, check_sizes

_PUZZLE = "gpt-oss-puzzle"  # the architecture whose one window, if it states one, is of every layer
Shapes = Mapping[str, tuple[int, ...]]
_PATTERN = "attention.sliding_window_pattern"
_READ = {
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_INERT = {"attention.causal", "expert_weights_norm", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
# Fields that change the results, and the values at which they change nothing; llama.cpp reads 0 as absent.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    _PATTERN: (2,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1, 3),  # softmax over all or over the selected experts, which gpt-oss always computes
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (1,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "swiglu_clamp_exp": (7.0,),
    "swiglu_limit": (7.0,),
    "use_parallel_residual": (0,),
}
_SAME_AS = {
    "attention.value_length": "d_head",
    "attention.key_length_swa": "d_head",
    "attention.value_length_swa": "d_head",
    "rope.dimension_count": "d_head",
    "rope.dimension_count_swa": "d_head",
}


class _Numbers:
    """Reads numbers of an architecture from the metadata, each checked for its type and sign."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], arch: str) -> None:
        self.path, self.metadata, self.arch = path, metadata, arch

    def of(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if value is None or isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise InputError(f"{self.path}: {self.arch}.{name} is {short(value)}, expected a number")
        if not 0 < value < math.inf:
            raise InputError(f"{self.path}: {self.arch}.{name} is {value}, expected a number above 0")
        return kind(value)

    def refuse_other_computations(self, cfg: Config) -> None:
        """Refuse the fields of an architecture that change the results and that are not computed here.

        Raises:
            InputError: a field has another value than the one that changes nothing.
        """
        neutral = _NEUTRAL | {name: (getattr(cfg, size),) for name, size in _SAME_AS.items()}
        neutral |= {
            "attention.scale": (0, float(np.float32(cfg.d_head**-0.5))),
            "rope.freq_base_swa": (cfg.rope.theta,),
        }
        if isinstance(pattern := self.metadata.get(f"{self.arch}.{_PATTERN}"), list):
            windows = [int(window is not None) for window in cfg.windows]
            neutral[_PATTERN] = (0, 1) if pattern == windows else ("that of the published models",)
        for name, values in neutral.items():
            value = self.metadata.get(f"{self.arch}.{name}")
            given = value if isinstance(value, list) else [value]
            if value is not None and any(one not in values for one in given):
                computed = " or ".join(map(str, values))
                raise InputError(
                    f"{self.path}: {self.arch}.{name} is {short(value)}, which changes the results; only {computed} is "
                    "computed here: load the checkpoint that the file was converted from, if it is a gpt-oss"
                )

    def unknown_fields(self) -> list[str]:
        """Return the names of the fields of the architecture that nothing reads."""
        known = {*_READ, *_NEUTRAL, *_SAME_AS, *_INERT, "attention.scale", "rope.freq_base_swa"}
        own = (name.removeprefix(f"{self.arch}.") for name in self.metadata if name.startswith(f"{self.arch}."))
        return sorted(name for name in own if name not in known)

    def of_layers(self, name: str, n_layers: int, least: int) -> list[int] | None:
        """Return a list with a number for each layer, or None if there is one for all."""
        value = self.metadata.get(f"{self.arch}.{name}")
        if not isinstance(value, list):
            return None
        if len(value) != n_layers or not all(type(one) is int and one >= least for one in value):
            raise InputError(
                f"{self.path}: {self.arch}.{name} is {short(value)}, expected {n_layers} whole numbers from {least} on"
            )
        return value


def read_gguf_config(path: Path, metadata: Mapping[str, Any], arch: str, tensors: Shapes) -> Config:
    """Return the config of a file of an architecture; `tensors` are the shapes of its tensors by name.

    Raises:
        InputError: a number is missing or not valid, or the routers have other numbers of experts.
    """
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: tensor 'token_embd.weight' is missing")
    number = _Numbers(path, metadata, arch)
    n_layers, heads = number.of("block_count", int), number.of("attention.head_count", int)
    experts = number.of_layers("expert_count", n_layers, 1) or [number.of("expert_count", int)] * n_layers
    _check_experts(path, arch, experts, tensors)
    cfg = Config(
        d_model=number.of("embedding_length", int),
        n_layers=n_layers,
        n_heads=heads,
        n_key_value_heads=number.of("attention.head_count_kv", int, heads),
        d_head=number.of("attention.key_length", int, 64),
        d_mlp=number.of("expert_feed_forward_length", int, metadata.get(f"{arch}.feed_forward_length")),
        d_vocab=tensors["token_embd.weight"][0],
        num_experts=max(experts),
        experts_per_token=number.of("expert_used_count", int, 4),
        windows=_windows(number, n_layers),
        n_ctx=number.of("context_length", int),
        eps=_rounded(number.of("attention.layer_norm_rms_epsilon", float)),
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        rope=_rope(number),
        layer_experts=tuple(experts) if len(set(experts)) > 1 else None,
    )
    number.refuse_other_computations(cfg)
    return check_sizes(path, cfg)


def unknown_fields(path: Path, metadata: Mapping[str, Any], arch: str) -> list[str]:
    """Return the names of the fields of the architecture that nothing reads."""
    return _Numbers(path, metadata, arch).unknown_fields()


def _windows(number: _Numbers, n_layers: int) -> tuple[int | None, ...]:
    if (windows := number.of_layers("attention.sliding_window", n_layers, 0)) is not None:
        return tuple(window or None for window in windows)
    window = number.of("attention.sliding_window", int)
    return tuple(window if layer % 2 == 0 or number.arch == _PUZZLE else None for layer in range(n_layers))


def _rope(number: _Numbers) -> Rope:
    kind, factor = number.metadata.get(f"{number.arch}.rope.scaling.type", "yarn"), 1.0
    if kind == "yarn":
        factor = number.of("rope.scaling.factor", float, 1.0)
    elif kind != "none":
        raise InputError(f"{number.path}: rope scaling {kind!r} is not computed, only yarn")
    theta = number.of("rope.freq_base", float)
    if factor <= 1:
        return Rope.plain(theta)
    return Rope(
        theta,
        factor,
        number.of("rope.scaling.yarn_beta_fast", float, 32.0),
        number.of("rope.scaling.yarn_beta_slow", float, 1.0),
        number.of("rope.scaling.original_context_length", int),
        False,
    )


def _check_experts(path: Path, arch: str, experts: list[int], tensors: Shapes) -> None:
    """Refuse routers of other numbers of experts than the metadata's, as of a pruned model."""
    routers = [tensors.get(f"blk.{layer}.ffn_gate_inp.weight", ()) for layer in range(len(experts))]
    counts = [shape[0] for shape in routers if len(shape) == 2]
    if len(counts) < len(experts) or counts == experts:
        return
    held = f"{counts[0]} experts in every layer" if len(set(counts)) == 1 else f"layers with {short(counts)} experts"
    stated = experts[0] if len(set(experts)) == 1 else short(experts)
    raise InputError(
        f"{path} has {held}, and {arch}.expert_count states {stated}: convert the model again with its own "
        f"{'number' if len(set(counts)) == 1 else 'numbers, a list with one for each layer'}"
    )


def _rounded(value: float) -> float:
    """Return the shortest decimal that is this number in float32, in which GGUF stores it."""
    return float(str(np.float32(value)))
