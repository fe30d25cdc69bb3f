"""Generation: batches of unequal prompts, greedy or sampled, each row as if it were alone.

A row's samples come from a generator seeded with (seed, row), so neither the batch nor the rows that stop earlier
change what it generates. The choice is made on the model's device; one step copies one number a row to the host.
Prompts are read in chunks of `PREFILL_TOKENS`, which bounds the memory of a pass.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.model.cache import KVCache
from workbench.model.decode_graph import DecodeStep
from workbench.model.inputs import need_tokenizer, read_batch
from workbench.model.sampling import Sampling

PREFILL_TOKENS = 16_384  # of all rows of a pass; more gain no speed, and take memory
_LEAST_COLUMNS = 256  # of one pass, however many rows there are


@torch.no_grad()
def generate(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int = 256,
    temperature: int | float | None = None,
    do_sample: bool | None = None,
    top_k: int | None = None,
    top_p: int | float | None = None,
    min_p: int | float | None = None,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
    stop_at_eos: bool = True,
    eos_token_id: int | Collection[int] | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    return_type: Literal["input", "str", "tokens", "new_tokens"] = "input",
    verbose: bool = False,
) -> Any:
    """Generate continuations of prompts.

    With return_type "input", a text gives a text and a tensor [batch pos] gives a tensor, both with the prompt; a list
    of rows of ids gives the new ids of each row, the stop token included. "str", "tokens" and "new_tokens" ask for
    texts, a tensor, or lists of new ids. Rows of a tensor that end early are filled with the padding token.

    temperature 0, the default, takes the most probable token. `do_sample`, `top_k`, `top_p` or `min_p` without a
    temperature sample at temperature 1. `stop` and `eos_token_id` replace the tokenizer's stop tokens; with
    `stop_at_eos=False` only `stop` ends a row. `seed` is one number for the call, or one for each prompt.
    A row also ends at max_new_tokens, or at the end of the context. verbose shows a progress bar.

    Raises:
        InputError: a prompt or an option is not valid, or the model's logits are not finite.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise InputError(f"max_new_tokens {max_new_tokens!r}: expected a whole number from 0")
    if return_type not in ("input", "str", "tokens", "new_tokens"):
        raise InputError(f"return_type {return_type!r} is unknown: use 'input', 'str', 'tokens' or 'new_tokens'")
    sampling = Sampling.of(temperature, do_sample=do_sample, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = read_batch(model, prompts, prepend_bos=prepend_bos, padding_side=padding_side).rows()
    seeds = [seed * 1_000_003 + i for i in range(len(rows))] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != len(rows):
        raise InputError(f"{len(seeds)} seeds for {len(rows)} prompts: pass one number, or one for each prompt")
    stops = _stops(model, stop, eos_token_id, stop_at_eos)
    new = _continue(model, rows, max_new_tokens, sampling, seeds, stops, verbose)
    return _returned(model, prompts, rows, new, return_type)


def _stops(
    model: Any, stop: Collection[int] | None, eos: int | Collection[int] | None, stop_at_eos: bool
) -> frozenset[int]:
    ending = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    if stop is None and eos is None and stop_at_eos and model.tokenizer is not None:
        ending = frozenset(model.tokenizer.stop_ids)
    return frozenset(stop or ()) | (ending if stop_at_eos else frozenset())


def _continue(
    model: Any,
    rows: list[list[int]],
    most: int,
    sampling: Sampling,
    seeds: list[int],
    stops: frozenset[int],
    verbose: bool,
) -> list[list[int]]:
    """Return the new tokens of every row."""
    rngs = [torch.Generator().manual_seed(s) for s in seeds]
    room = [min(most, model.cfg.n_ctx - len(row)) for row in rows]
    out: list[list[int]] = [[] for _ in rows]
    live = [i for i, n in enumerate(room) if n > 0]
    if not live:
        return out
    capacity = max(len(rows[i]) + room[i] for i in live)
    cache = KVCache(model.cfg, len(live), capacity, dtype=model.dtype, device=model.devices)
    cache.rows = torch.tensor(live)
    logits, step = _read_prompts(model, cache, [rows[i] for i in live]), DecodeStep(model, cache)
    bar = _progress(max(room), verbose)
    while True:
        chosen = sampling.choose(logits, [rngs[i] for i in live])
        tokens = _finite(model, chosen, len(out[live[0]]))
        bar.update(1)
        for i, token in zip(live, tokens, strict=True):
            out[i].append(token)
        going = [j for j, i in enumerate(live) if tokens[j] not in stops and len(out[i]) < room[i]]
        if not going:
            bar.close()
            return out
        if len(going) < len(live):
            kept = torch.tensor(going)
            cache.select(kept)
            live, chosen = [live[j] for j in going], chosen[kept.to(chosen.device)]
        logits = step(chosen)


def _read_prompts(model: Any, cache: KVCache, prompts: list[list[int]]) -> Float[Tensor, "row d_vocab"]:
    """Fill the cache with prompts, chunk by chunk, and return the logits behind the last token of each."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in prompts], batch_first=True)
    columns = max(_LEAST_COLUMNS, PREFILL_TOKENS // len(prompts))
    last: Tensor | None = None
    for start in range(0, padded.shape[1], columns):
        chunk = padded[:, start : start + columns]
        n_real = [min(max(len(row) - start, 0), chunk.shape[1]) for row in prompts]
        residual = model.residual(chunk, cache=cache, n_real=n_real)
        real = torch.tensor(n_real).to(residual.device, non_blocking=True)[:, None, None]
        here = residual.gather(1, (real - 1).clamp(min=0).expand(-1, 1, residual.shape[2]))
        last = here if last is None else torch.where(real > 0, here, last)
    with model.within(model.context.last_tokens()):
        return model.unembed(model.ln_final(last))[:, 0]


def _finite(model: Any, chosen: Int[Tensor, " row"], step: int) -> list[int]:
    """Return the chosen ids. `Sampling.choose` marks a row whose logits are not finite with −1."""
    tokens: list[int] = chosen.tolist()
    if -1 in tokens:
        if model.checkpoint is not None:
            model.checkpoint.check_values()  # names the tensor if it is a weight
        raise InputError(
            f"the logits of new token {step} of a prompt are not finite: an intervention, an adapter or changed "
            "weights hold NaN or infinity"
        )
    return tokens


def _progress(total: int, verbose: bool) -> Any:
    from tqdm.auto import tqdm  # late: a tenth of a second

    return tqdm(total=total, disable=not verbose, desc="generate", unit="token")


def _returned(model: Any, given: Any, rows: list[list[int]], new: list[list[int]], return_type: str) -> Any:
    texts = isinstance(given, str) or (isinstance(given, Sequence) and bool(given) and isinstance(given[0], str))
    if return_type == "input":
        return_type = "str" if texts else "tokens" if isinstance(given, Tensor) else "new_tokens"
    if return_type == "new_tokens":
        return new
    every = [row + more for row, more in zip(rows, new, strict=True)]
    if return_type == "str":
        decoded = [need_tokenizer(model).decode(row) for row in every]
        one = isinstance(given, str) or (isinstance(given, Tensor) and given.dim() == 1)
        return decoded[0] if one else decoded
    filler = 0 if model.tokenizer is None else model.tokenizer.pad_token_id or 0
    tensors = [torch.tensor(row) for row in every]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(model.device)
    return padded[0] if isinstance(given, Tensor) and given.dim() == 1 else padded
