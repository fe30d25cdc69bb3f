"""Write checkpoints in the published layouts, and random checkpoints of any size for tests."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.model.checkpoint import BUNDLED
from workbench.model.config import GROUP, PUBLISHED, Config, Rope
from workbench.model.config_file import read_config
from workbench.model.names import LAYOUTS, name_in, shapes
from workbench.model.safetensors_file import save_tensors
from workbench.outputs import staged


class RandomTensors(Mapping[str, Tensor]):
    """Random weights of plausible size, each generated from the seed and its name when it is accessed.

    Norms are near 1, sinks are as large as the published ones, and gate/up rows are large enough to reach the clamp.
    A tensor is drawn on `device`, and other devices draw other numbers from the same seed.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        seed: int = 0,
        experts: str = "mxfp4",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shapes, self._seed, self._dtype, self._device = shapes(cfg, experts), seed, dtype, device

    def __getitem__(self, name: str) -> Tensor:
        """Return a random tensor of the shape [...] that its name has in the checkpoint."""
        shape = self._shapes[name]
        rng = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + list(self._shapes).index(name))
        kind = name.split(".", 2)[-1]
        if kind.endswith("blocks"):
            return torch.randint(256, shape, dtype=torch.uint8, generator=rng, device=self._device)
        if kind.endswith("scales"):  # random codes have an r.m.s. of 2.9: about as loud as the dense weights below
            loud = 3 if "gate_up" in kind else 1
            middle = 127 + math.log2(loud / 2.9 / math.sqrt(shape[-1] * GROUP))
            return (middle + torch.randn(shape, generator=rng, device=self._device) * 0.5).round().to(torch.uint8)
        mean, spread = self._normal(name, shape)
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(mean, spread, generator=rng)

    @staticmethod
    def _normal(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return mean and standard deviation of a random tensor that is not packed."""
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


def save_random(folder: str | Path, cfg: Config, *, seed: int = 0, experts: str = "mxfp4") -> Path:
    """Write a checkpoint of random weights in the Hugging Face layout, and nano's tokenizer for a small vocabulary."""

    def tokenizer(staging: Path) -> None:
        if cfg.d_vocab < PUBLISHED["20b"].d_vocab:
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
                shutil.copy(BUNDLED["nano"] / name, staging)

    return save_checkpoint(folder, cfg, RandomTensors(cfg, seed=seed, experts=experts), extra=tokenizer)


def save_checkpoint(
    folder: str | Path,
    cfg: Config,
    tensors: Mapping[str, Tensor],
    *,
    layout: str = "huggingface",
    shard_bytes: int = 1_000_000_000,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write canonical tensors, name → [...], as a checkpoint, packed or dense as they are.

    The folder is renamed into place when it is complete. Tensors are accessed one at a time; memory holds one shard or
    the largest tensor. `extra` may add files (a tokenizer, a card) before the rename.

    Raises:
        InputError: the folder exists, or a tensor or the config does not fit the layout.
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists: choose another folder, or move it away")
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    experts = "dense" if "blocks.0.mlp.experts.down.weight" in tensors else "mxfp4"
    if layout == "original" and experts == "dense":
        raise InputError(
            "the original layout holds packed experts only: quantise them, or write the huggingface layout"
        )
    wanted = shapes(cfg, experts)
    if wrong := sorted(set(wanted) ^ set(tensors)):
        raise InputError(f"tensor {wrong[0]!r} is {'unexpected' if wrong[0] in tensors else 'missing'} for this config")
    with staged(target, command="save_checkpoint", owned=lambda existing: False) as staging:
        staging.mkdir()
        _write_config(staging, cfg, layout, experts, tensors)
        _write_shards(staging, tensors, wanted, layout, shard_bytes)
        if extra is not None:
            extra(staging)
    return target


def _write_shards(
    folder: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], layout: str, shard_bytes: int
) -> None:
    fused: dict[str, list[str]] = {}
    for name in wanted:  # in this order: q, k, v are one matrix in the original layout
        fused.setdefault(name_in(layout, name), []).append(name)
    shards: list[Path] = []
    index: dict[str, int] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append(folder / f"part-{len(shards)}.safetensors")
        save_tensors(shard, shards[-1], metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, len(shards) - 1))
        shard.clear()

    for stored, parts in fused.items():
        # before the next tensor is made; 4 bytes a value is the most that a file holds
        most = sum(math.prod(wanted[part]) * (1 if stored.endswith(("blocks", "scales")) else 4) for part in parts)
        if shard and sum(t.nbytes for t in shard.values()) + most > shard_bytes:
            flush()
        pieces = [_checked(part, tensors[part], wanted[part]) for part in parts]
        shard[stored] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
        del pieces
    flush()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(path.stat().st_size for path in shards)
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    if len(shards) > 1 and layout == "huggingface":
        listing = {"metadata": {"total_size": total}, "weight_map": {t: names[i] for t, i in index.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    dtypes = (torch.uint8,) if name.endswith((".blocks", ".scales")) else (torch.bfloat16, torch.float32)
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise InputError(
            f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, the config requires {list(shape)} of "
            f"{' or '.join(map(str, dtypes))}"
        )
    return tensor


def _write_config(folder: Path, cfg: Config, layout: str, experts: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the config, and refuse one that would be read back as another model."""
    written = _original(cfg) if layout == "original" else _hugging_face(cfg, experts, tensors)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    back = read_config(folder)
    meant = cfg if cfg.rope.factor is not None else replace(cfg, rope=Rope.plain(cfg.rope.theta))
    if lost := [field.name for field in fields(Config) if getattr(back, field.name) != getattr(meant, field.name)]:
        name = lost[0]
        raise InputError(
            f"the {layout} layout cannot store {name} {getattr(cfg, name)}: "
            f"it would be read back as {getattr(back, name)}"
        )


def _sizes(cfg: Config) -> dict[str, Any]:
    """Return the sizes that both layouts name alike."""
    return {
        "num_hidden_layers": cfg.n_layers,
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "head_dim": cfg.d_head,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "sliding_window": next((window for window in cfg.windows if window is not None), 128),
        "swiglu_limit": cfg.swiglu_limit,
    }


def _original(cfg: Config) -> dict[str, Any]:
    rope = cfg.rope
    return _sizes(cfg) | {
        "num_experts": cfg.num_experts,
        "experts_per_token": cfg.experts_per_token,
        "initial_context_length": cfg.n_ctx if rope.factor is None else rope.original_ctx,
        "rope_theta": rope.theta,
        "rope_scaling_factor": rope.factor or 1.0,
        "rope_ntk_alpha": rope.beta_slow,
        "rope_ntk_beta": rope.beta_fast,
    }


def _kind(cfg: Config) -> dict[str, Any]:
    """Return the model type; that of Puzzle names experts and window of each layer, and gpt_oss one for all."""
    if cfg.layer_experts is None and len(set(cfg.windows) - {None}) < 2:
        return {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    blocks = [
        {"num_local_experts": cfg.experts_of(layer), "sliding_window": window}
        for layer, window in enumerate(cfg.windows)
    ]
    return {"architectures": ["GptOssPuzzleForCausalLM"], "model_type": "gpt_oss_puzzle", "block_configs": blocks}


def _hugging_face(cfg: Config, experts: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    rope = cfg.rope
    yarn = {
        "rope_type": "yarn",
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "original_max_position_embeddings": rope.original_ctx,
        "truncate": rope.truncate,
    }
    written = {
        **_kind(cfg),
        **_sizes(cfg),
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
        "torch_dtype": str(tensors["blocks.0.attn.q.weight"].dtype).removeprefix("torch."),
    }
    if experts == "mxfp4":
        unquantized = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": unquantized}
    return written
