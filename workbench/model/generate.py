"""Generation: batches of unequal prompts, greedy or sampled, each row as if it were alone.

A row's samples come from a generator seeded with (seed, row), so that neither the batch it is in nor the rows
that stop before it change what it says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.model.cache import KVCache

if TYPE_CHECKING:
    from workbench.model.transformer import GptOss


@torch.no_grad()
def generate(
    model: GptOss,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, the stop token that ended it included.

    temperature 0 takes the likeliest token. `stop` defaults to the tokenizer's stop tokens. `seed` is one number
    for the call, or one a prompt. A row ends at a stop token, at max_new_tokens, or at the end of the context.
    """
    rows = [list(map(int, prompt)) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("every prompt needs at least one token")
    stops = frozenset(model.tokenizer.stop_ids if stop is None and model.tokenizer is not None else stop or ())
    seeds = [seed * 1_000_003 + i for i in range(len(rows))] if isinstance(seed, int) else list(seed)
    rngs = [torch.Generator().manual_seed(s) for s in seeds]
    room = [min(max_new_tokens, model.cfg.n_ctx - len(row)) for row in rows]

    out: list[list[int]] = [[] for _ in rows]
    live = [i for i, n in enumerate(room) if n > 0]
    if not live:
        return out
    lengths = torch.tensor([len(rows[i]) for i in live])
    capacity = max(len(rows[i]) + room[i] for i in live)
    cache = KVCache(model.cfg, len(live), capacity, dtype=model.dtype, device=model.devices)
    cache.rows = torch.tensor(live)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in live], batch_first=True).to(model.device)
    logits = model.logits(model.residual(padded, cache=cache, n_real=lengths.tolist()), lengths[:, None] - 1)[:, 0]
    cache.truncate(lengths)
    while True:
        tokens = [_choose(row, temperature, rngs[i]) for row, i in zip(logits, live, strict=True)]
        for i, token in zip(live, tokens, strict=True):
            out[i].append(token)
        going = [j for j, i in enumerate(live) if tokens[j] not in stops and len(out[i]) < room[i]]
        if not going:
            return out
        if len(going) < len(live):
            cache.select(torch.tensor(going))
            live, tokens = [live[j] for j in going], [tokens[j] for j in going]
        logits = model(torch.tensor(tokens, device=model.device)[:, None], cache=cache)[:, 0]


def _choose(logits: Float[Tensor, " d_vocab"], temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(-1).cpu(), 1, generator=rng))
