"""Trainable low-rank updates on a model, and the PEFT folder that holds them.

The factors are in float32 whatever the model's dtype, and start as in PEFT: A uniform in ±1/√inputs, B zero, so that an
untrained adapter changes nothing.

Reference: LoRA, arXiv 2106.09685; PEFT 0.21, tuners/lora/layer.py, reset_lora_parameters and ParamWrapper.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.model.adapter_config import CONFIG, read_adapter_config
from workbench.model.adapter_names import Target, targets
from workbench.model.config import Config
from workbench.model.lora import WEIGHTS, load_adapter, unload_adapter
from workbench.model.low_rank import LowRank
from workbench.model.safetensors_file import save_tensors
from workbench.model.transformer import GptOss

# What can be trained, by the name of a user's choice: the parts of a layer.
TRAINABLE = {
    "attention": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "router": ("mlp.router",),
    "experts": ("mlp.experts.gate_up", "mlp.experts.down"),
}
_PEFT_NAMES = {
    "attn.q": "q_proj",
    "attn.k": "k_proj",
    "attn.v": "v_proj",
    "attn.o": "o_proj",
    "mlp.router": "mlp.router.weight",
    "mlp.experts.gate_up": "mlp.experts.gate_up_proj",
    "mlp.experts.down": "mlp.experts.down_proj",
}


@dataclass(frozen=True)
class Options:
    """What is trained: names of TRAINABLE, the rank of the updates, and alpha; updates are scaled by alpha / rank.

    Raises:
        InputError: a part is unknown, or the rank or alpha is not positive.
    """

    parts: tuple[str, ...] = ("attention", "experts")
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.parts if name not in TRAINABLE]
        if unknown or not self.parts:
            raise InputError(f"parts {', '.join(self.parts) or '(none)'}: choose from {', '.join(TRAINABLE)}")
        if self.rank < 1:
            raise InputError(f"rank {self.rank}: expected a positive whole number")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise InputError(f"alpha {self.alpha}: expected a positive number")

    def covers(self, part: str) -> bool:
        """Return whether a part, as in "blocks.3.attn.q", is trained."""
        return any(part.endswith(f".{end}") for name in self.parts for end in TRAINABLE[name])

    @property
    def scale(self) -> float:
        """Return the factor of every update."""
        return self.alpha / self.rank


def attach(model: GptOss, options: Options, seed: int) -> dict[str, LowRank]:
    """Put a trainable update on every chosen matrix of a model; return them by part.

    Raises:
        InputError: the model has an adapter already.
    """
    if model.adapter is not None:
        raise InputError(f"the model already has the adapter {model.adapter.path}: unload it first")
    rng = torch.Generator().manual_seed(seed)
    updates = {t.part: _untrained(t, options, rng) for t in _chosen(model.cfg, options)}
    for part, update in updates.items():
        _place(model, part, update)
    return updates


def attach_existing(model: GptOss, options: Options, folder: str | Path) -> dict[str, LowRank]:
    """Attach the factors of a PEFT folder that adapts the same matrices at the same rank and alpha.

    Raises:
        InputError: the folder is damaged, does not fit the model, or adapts other matrices, or in another way.
    """
    config = read_adapter_config(Path(folder))
    given = {"rank": config["r"], "alpha": float(config["lora_alpha"])}
    wanted = {"rank": options.rank, "alpha": float(options.alpha)}
    if given != wanted or config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise InputError(f"{folder} has {given}, and {wanted} was requested: give the options of the folder")
    adapter = load_adapter(model, folder)
    attached = {part: model.get_submodule(part).lora for part in adapter.parts}
    replaced = bool(adapter.replaced)
    unload_adapter(model)
    chosen = {t.part for t in _chosen(model.cfg, options)}
    if replaced or set(attached) != chosen:
        other = min(set(attached) ^ chosen) if set(attached) != chosen else "weights that are replaced"
        raise InputError(f"{folder} and the parts to train differ in {other}: choose the parts of the folder")
    updates: dict[str, LowRank] = {}
    for part, loaded in attached.items():
        assert isinstance(loaded, LowRank)
        updates[part] = LowRank(loaded.a.detach().float(), loaded.b.detach().float() / options.scale, options.scale)
        _place(model, part, updates[part])
    return updates


def detach(model: GptOss, updates: Collection[str]) -> None:
    """Take the updates off the model again."""
    for part in updates:
        model.get_submodule(part).lora = None


def write_folder(model: GptOss, updates: dict[str, LowRank], options: Options, folder: Path) -> None:
    """Write the updates as a new PEFT folder, which PEFT and `wb.load(…, adapter=folder)` read."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for module, its_targets in targets(model.cfg).items():
        adapted = [target for target in its_targets if target.part in updates]
        for n, target in enumerate(
            adapted
        ):  # the first of two parameters of a module is wrapped first, and lies inside
            inside = ".base_layer" * (len(adapted) - 1 - n)
            a, b = _as_stored(updates[target.part])
            name = f"base_model.model.{module}{inside}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    names = [_PEFT_NAMES[end] for name in options.parts for end in TRAINABLE[name]]
    base = model.checkpoint.path if model.checkpoint is not None else None
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base and str(base),
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [name for name in names if "." not in name],
        "target_parameters": [name for name in names if "." in name],
    }
    if "unsloth" in str(base).lower():  # such a name alone would make the order of lora_B's columns ambiguous
        config["lora_B_layout"] = "rank_major"
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _chosen(cfg: Config, options: Options) -> list[Target]:
    return [target for of_module in targets(cfg).values() for target in of_module if options.covers(target.part)]


def _untrained(target: Target, options: Options, rng: torch.Generator) -> LowRank:
    stack = (target.experts,) if target.experts > 1 else ()
    bound = target.inputs**-0.5
    a = torch.empty(*stack, target.inputs, options.rank).uniform_(-bound, bound, generator=rng)
    return LowRank(a, torch.zeros(*stack, options.rank, target.outputs), options.scale)


def _place(model: GptOss, part: str, update: LowRank) -> None:
    module = model.get_submodule(part)
    module.lora = update.to(next(module.parameters()).device).requires_grad_(True)


def _as_stored(update: LowRank) -> tuple[Float[Tensor, "rows inputs"], Float[Tensor, "outputs columns"]]:
    """Return A and B as PEFT stores them: of experts, the rows of A by expert and the columns of B by rank."""
    a, b = (factor.detach().cpu().contiguous() for factor in (update.a, update.b))
    if a.dim() == 2:
        return a.mT.contiguous(), b.mT.contiguous()
    return a.mT.flatten(0, 1).contiguous(), b.permute(2, 1, 0).flatten(1).contiguous()


def parameters(updates: dict[str, LowRank]) -> dict[str, nn.Parameter]:
    """Return every factor by its name, as in "blocks.0.attn.q.a"."""
    return {f"{part}.{name}": p for part, update in updates.items() for name, p in update.named_parameters()}
