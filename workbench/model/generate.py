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
    lengths = torch.tensor([len(row) for row in rows])
    room = [min(max_new_tokens, model.cfg.n_ctx - len(row)) for row in rows]

    capacity = max(len(row) + n for row, n in zip(rows, room, strict=True))
    cache = KVCache(model.cfg, len(rows), capacity, dtype=model.dtype, device=model.devices)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    last = model.residual(padded, cache=cache)[torch.arange(len(rows)), lengths - 1]
    cache.truncate(lengths)

    out: list[list[int]] = [[] for _ in rows]
    live = [i for i, n in enumerate(room) if n > 0]
    if len(live) < len(rows):
        cache.select(torch.tensor(live, dtype=torch.long))
        last = last[live]
    while live:
        logits = model.unembed(model.ln_final(last[:, None]))[:, 0]
        tokens = [_choose(row, temperature, rngs[i]) for row, i in zip(logits, live, strict=True)]
        for i, token in zip(live, tokens, strict=True):
            out[i].append(token)
        going = [j for j, i in enumerate(live) if tokens[j] not in stops and len(out[i]) < room[i]]
        if not going:
            break
        if len(going) < len(live):
            cache.select(torch.tensor(going))
            live, tokens = [live[j] for j in going], [tokens[j] for j in going]
        last = model.residual(torch.tensor(tokens, device=model.device)[:, None], cache=cache)[:, 0]
    return out


def _choose(logits: Float[Tensor, " d_vocab"], temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(-1).cpu(), 1, generator=rng))
