"""Writing checkpoints in the published layouts, and random ones of any size to test with."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.errors import InputError
from workbench.model.config import Config
from workbench.model.names import name_in, shapes


class RandomTensors(Mapping[str, Tensor]):
    """Plausible random weights, each made when asked for from the seed and its name: big models stream.

    Norms near 1, sinks as loud as the published ones, and gate/up rows loud enough that some gates clamp.
    """

    def __init__(
        self, cfg: Config, *, seed: int = 0, experts: str = "mxfp4", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._shapes, self._seed, self._dtype = shapes(cfg, experts), seed, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        rng = torch.Generator().manual_seed(self._seed * 1_000_003 + list(self._shapes).index(name))
        kind = name.split(".", 2)[-1]
        if kind.endswith("blocks"):
            return torch.randint(256, shape, dtype=torch.uint8, generator=rng)
        if kind.endswith(
            "scales"
        ):  # codes have an r.m.s. of 2.8: this makes N(0, 1/inputs), three times that for gates
            loud = 3 if "gate_up" in kind else 1
            middle = 127 + math.log2(loud / 2.8 / math.sqrt(shape[-1] * 32))
            return (middle + torch.randn(shape, generator=rng) * 0.5).round().to(torch.uint8)
        mean, spread = self._normal(name, shape)
        return torch.empty(shape, dtype=self._dtype).normal_(mean, spread, generator=rng)

    @staticmethod
    def _normal(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of a tensor that is not packed."""
        if ".ln" in name or name.startswith("ln"):
            return 1.0, 0.2
        if name.endswith("sinks"):
            return 2.0, 1.4
        if name.endswith("bias"):
            return 0.0, 0.1
        if name == "embed.weight":
            return 0.0, 0.5
        return 0.0, (3 if name.endswith("gate_up.weight") else 1) * shape[1] ** -0.5

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def save_checkpoint(
    folder: str | Path,
    cfg: Config,
    tensors: Mapping[str, Tensor],
    *,
    layout: str = "huggingface",
    shard_bytes: int = 4_000_000_000,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write canonical tensors as a checkpoint, packed or dense as they are; the folder appears whole or not at all.

    `extra` may add files (a tokenizer, a card) before that. An existing folder is refused.
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists: name another folder, or move it away")
    experts = "dense" if "blocks.0.mlp.experts.down.weight" in tensors else "mxfp4"
    if layout == "original" and experts == "dense":
        raise InputError(
            "the original layout holds packed experts only: quantise them, or write the huggingface layout"
        )
    wanted = shapes(cfg, experts)
    if set(wanted) != set(tensors):
        raise InputError(
            f"these tensors are no model of this config: {sorted(set(wanted) ^ set(tensors))[:3]} too many or missing"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _write_shards(staging, tensors, layout, shard_bytes)
        (staging / "config.json").write_text(json.dumps(_config(cfg, layout, experts, tensors), indent=2) + "\n")
        if extra is not None:
            extra(staging)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], layout: str, shard_bytes: int) -> None:
    stored: dict[str, list[str]] = {}
    for name in tensors:
        stored.setdefault(name_in(layout, name), []).append(name)
    shards: list[Path] = []
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{len(shards) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append(path)
        index.update(dict.fromkeys(shard, path.name))
        shard.clear()

    for name, parts in stored.items():
        tensor = torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]].contiguous()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    names = {p.name: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, p in enumerate(shards, 1)}
    if len(shards) == 1:
        names = {shards[0].name: "model.safetensors"}
    for path in shards:
        path.rename(folder / names[path.name])
    if len(shards) > 1 and layout == "huggingface":
        size = sum((folder / name).stat().st_size for name in names.values())
        listing = {"metadata": {"total_size": size}, "weight_map": {t: names[p] for t, p in index.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")


def _config(cfg: Config, layout: str, experts: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    rope = cfg.rope
    windows = {w for w in cfg.windows if w is not None}
    shared = {
        "num_hidden_layers": cfg.n_layers,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "head_dim": cfg.d_head,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "sliding_window": min(windows, default=128),
        "swiglu_limit": cfg.swiglu_limit,
    }
    if layout == "original":
        return shared | {
            "num_experts": cfg.num_experts,
            "experts_per_token": cfg.experts_per_token,
            "initial_context_length": rope.original_ctx,
            "rope_theta": rope.theta,
            "rope_scaling_factor": rope.factor or 1.0,
            "rope_ntk_alpha": rope.beta_slow,
            "rope_ntk_beta": rope.beta_fast,
        }
    yarn = {
        "rope_type": "yarn",
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "original_max_position_embeddings": rope.original_ctx,
        "truncate": rope.truncate,
    }
    written: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **shared,
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in cfg.windows],
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.eps,
        "swiglu_alpha": cfg.swiglu_alpha,
        "hidden_act": "silu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": "default"} if rope.factor is None else yarn,
        "torch_dtype": str(tensors["embed.weight"].dtype).removeprefix("torch."),
    }
    if experts == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return written
