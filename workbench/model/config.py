"""A model's configuration, with the names of TransformerLens: sizes, windows, rotary positions. No size is assumed.

`workbench.model.config_file` reads it from a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
            f"{path}: {cfg.rope} requires theta above 1, a factor of at least 1, and beta_fast above beta_slow"
        )
    fewest = min(cfg.layer_experts or (cfg.num_experts,))
    if cfg.experts_per_token > fewest:
        layer = "" if cfg.layer_experts is None else f" in layer {cfg.layer_experts.index(fewest)}"
        raise InputError(f"{path}: a token goes to {cfg.experts_per_token} experts, but there are {fewest}{layer}")
    return cfg
