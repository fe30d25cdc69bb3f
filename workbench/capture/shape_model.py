"""A published shape instead of a model, to plan a capture without weights.

It has the sizes and the tokenizer of gpt-oss, and calls hooks with random numbers that compress about as activations
do: floats are normal, and an expert number depends in part on the token.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench import harmony
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Transcript
from workbench.harmony.vocabulary import Tokenizer
from workbench.hooks.names import BLOCK
from workbench.model.config import PUBLISHED, Config

_NAME = re.compile(r"(?:openai/)?gpt-oss-(20b|120b)|(20b|120b)")
_TABLE = 4096  # tokens are taken modulo this where something depends on the token
_OF_TOKEN = 0.6  # of the standard deviation of router logits: what the token alone decides


def published_name(source: str) -> str | None:
    """Return "20b" or "120b" if the source names a published shape whose weights are not on this machine."""
    match = _NAME.fullmatch(source)
    if match is None or Path(source).exists():
        return None
    return None if "/" in source and _is_cached(source) else match[1] or match[2]


def _is_cached(hub_id: str) -> bool:
    """Return whether the local cache of the hub has the weights."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        return False
    names = [f.file_name for repo in cached if repo.repo_id == hub_id for r in repo.revisions for f in r.files]
    return any(name.endswith(".safetensors") for name in names)


class ShapeModel:
    """What a capture needs of a model, without weights: `compute` runs with it as with a model."""

    device = torch.device("cpu")
    devices = (device,)

    def __init__(self, name: str, cfg: Config, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
        self.cfg, self.tokenizer, self.dtype = cfg, tokenizer, dtype
        self.checkpoint = SimpleNamespace(path=Path(name), digest="")
        self._hooks: Sequence[tuple[str, Callable[..., Any]]] = ()
        self._random = torch.Generator().manual_seed(0)

    @classmethod
    def published(cls, size: str) -> "ShapeModel":
        """Return the shape of gpt-oss-20b or -120b, with the published vocabulary."""
        return cls(f"gpt-oss-{size}", PUBLISHED[size], harmony.tokenizer())

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
        """Call these functions with activations while the context lasts."""
        self._hooks = fwd_hooks
        try:
            yield
        finally:
            self._hooks = ()

    def residual(self, tokens: Tensor, *, packed: Sequence[int]) -> None:
        """Call the hooks of the blocks with random activations of these tokens [1 pos]."""
        routers: dict[str, Tensor] = {}
        for name, function in self._hooks:
            layer, hook = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            if hook.startswith("mlp.router") or hook.startswith("mlp.hook_expert"):
                if layer not in routers:
                    routers = {layer: self._router_logits(tokens, int(layer))}
                value = self._routed(hook, routers[layer])
            else:
                value = self._activation(hook, tokens.shape[1])
            function(value, hook=SimpleNamespace(name=name))

    def _activation(self, hook: str, n: int) -> Tensor:
        sizes = {
            "batch": 1,
            "pos": n,
            "query_pos": n,
            "key_pos": n,
            "1": 1,
            "head": self.cfg.n_heads,
            "kv": self.cfg.n_key_value_heads,
            "d_head": self.cfg.d_head,
            "d_model": self.cfg.d_model,
            "d_mlp": self.cfg.d_mlp,
            "slot": self.cfg.experts_per_token,
            "expert": self.cfg.num_experts,
        }
        shape = [sizes[axis] for axis in BLOCK[hook].split()]
        if "key_pos" in BLOCK[hook]:  # of one head, which stands for all: the others take no memory
            one = torch.randn((n, n), generator=self._random).tril()
            return (one.softmax(-1) if hook == "attn.hook_pattern" else one).expand(shape)
        values = torch.randn(shape, generator=self._random)
        return torch.sigmoid(values - 1) if hook == "attn.hook_sink" else values.to(self.dtype)

    def _router_logits(self, tokens: Tensor, layer: int) -> Tensor:
        num_experts = self.cfg.experts_of(layer)
        of_token = torch.randn((_TABLE, num_experts), generator=torch.Generator().manual_seed(layer))
        noise = torch.randn((tokens.shape[1], num_experts), generator=self._random)
        return (_OF_TOKEN * of_token[tokens[0] % _TABLE] + (1 - _OF_TOKEN**2) ** 0.5 * noise)[None]

    def _routed(self, hook: str, logits: Tensor) -> Tensor:
        if hook == "mlp.router.hook_out":
            return logits
        best = logits.topk(self.cfg.experts_per_token)
        return best.indices if hook == "mlp.hook_expert_indices" else best.values.softmax(-1)


def sample_transcripts(tokenizer: Tokenizer, n: int, tokens: int) -> list[Transcript]:
    """Return transcripts of this many tokens each: a fifth prompt, most of the rest analysis, of random ids.

    Ids are drawn with Zipf's frequencies, as words of a text have them. They only stand for what will be captured.
    """
    special = sorted(tokenizer.special.values())
    ordinary = np.setdiff1d(np.arange(tokenizer.d_vocab), special)
    frequency = 1 / np.arange(1, len(ordinary) + 1)
    rng = np.random.default_rng(0)
    ids = rng.choice(ordinary, n * tokens, p=frequency / frequency.sum())
    return [_transcript(tokenizer, i, ids[i * tokens : (i + 1) * tokens].tolist()) for i in range(n)]


def _transcript(tokenizer: Tokenizer, i: int, ids: list[int]) -> Transcript:
    mark = {name: tokenizer.special[f"<|{name}|>"] for name in ("start", "channel", "message", "end", "return")}
    role = {name: tokenizer.encode(name) for name in ("user", "assistant", "analysis", "final")}

    def message(author: str, channel: str, content: list[int], close: str) -> list[int]:
        channel_marks = [mark["channel"], *role[channel]] if channel else []
        return [mark["start"], *role[author], *channel_marks, mark["message"], *content, mark[close]]

    a, b = len(ids) // 5, len(ids) * 9 // 10
    asked = message("user", "", ids[:a], "end")
    thought = message("assistant", "analysis", ids[a:b], "end")
    answer = message("assistant", "final", ids[b:], "return")
    everything = np.array([*asked, *thought, *answer], dtype=np.int32)
    row = everything[: max(len(ids), len(asked) + 1)]
    effort = EFFORTS[i % 3]
    return Transcript(f"{i // 3}/{effort}", str(i // 3), effort, row, len(asked), "", meta={"task": "any"})
