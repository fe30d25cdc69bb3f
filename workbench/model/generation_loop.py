"""The loop of generation as an iterator: prompts are read once, then every step adds one token to each unfinished row.

Prompts are read in chunks of `PREFILL_TOKENS`, which bounds the memory of a pass. Equal prompts, such as the samples of
one prompt, are read once and share what was computed, unless a hook has to see each of them.
"""

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.logits import logprob
from workbench.model.cache import KVCache
from workbench.model.decode_graph import DecodeStep
from workbench.model.prompt_cache import PromptCache, installed_hooks
from workbench.model.sampling import Sampling, token_counts

PREFILL_TOKENS = 16_384  # of all rows of a pass; more gain no speed, and take memory
_LEAST_COLUMNS = 256  # of one pass, however many rows there are


@dataclass(frozen=True)
class GenerationStep:
    """The tokens that one step adds, one to each row that was unfinished.

    index: of the step, from 0. rows: of each token, the number of its row: of its prompt or, with several samples, of
    its sample. logprobs: natural logarithm of the token's probability under the model, at temperature 1 and before
    top_k, top_p and min_p; empty unless it was asked for. finished: whether the token is the last of its row.
    elapsed_s: seconds since the beginning; of step 0 the time to the first token. shared_tokens: of the prompts, tokens
    that were not computed again because they were cached or equal to another row's.
    """

    index: int
    rows: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: list[bool]
    elapsed_s: float
    shared_tokens: int


@dataclass
class GenerationSpeed:
    """New tokens a second, and the mean time to the first token, over one or several generations.

    `tokens_per_s` includes the time in which prompts are read, `decoding_tokens_per_s` begins after the first token.
    """

    tokens: int = 0
    _first_tokens: int = 0  # of every row, one
    _first_s: float = 0.0
    _generations: int = 0
    _ended_s: float = 0.0  # of generations before the present one
    _present_s: float = 0.0

    def add(self, step: GenerationStep) -> None:
        """Count the tokens of a step."""
        if step.index == 0:
            self._ended_s, self._generations = self.elapsed_s, self._generations + 1
            self._first_s, self._first_tokens = self._first_s + step.elapsed_s, self._first_tokens + len(step.tokens)
        self.tokens, self._present_s = self.tokens + len(step.tokens), step.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of all generations so far, prompts included."""
        return self._ended_s + self._present_s

    @property
    def first_token_s(self) -> float:
        """Return the mean seconds to the first token of a generation; 0 before the first."""
        return self._first_s / self._generations if self._generations else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Return new tokens a second, prompts included; 0 before the first."""
        return self.tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def decoding_tokens_per_s(self) -> float | None:
        """Return new tokens a second after the first token of each generation; None if there were no others."""
        seconds = self.elapsed_s - self._first_s
        return (self.tokens - self._first_tokens) / seconds if seconds > 0 else None

    def __str__(self) -> str:
        decoding = self.decoding_tokens_per_s
        then = "" if decoding is None else f", then {decoding:,.1f} tokens/s"
        return f"{self.tokens_per_s:,.1f} tokens/s, first token after {self.first_token_s:.2f} s{then}"


@dataclass(frozen=True)
class Request:
    """What is to be generated: the rows of prompt ids, a seed for each, and when rows end.

    use_past_kv_cache: whether a step computes its new token alone; otherwise it computes the whole row again.
    """

    rows: list[list[int]]
    seeds: list[int]
    max_new_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    logprobs: bool = False
    use_past_kv_cache: bool = True


def generation_steps(
    model: Any, request: Request, prompt_cache: PromptCache | None = None
) -> Generator[GenerationStep, None, None]:
    """Yield one step after the other until every row has ended. Closing the generator ends the work.

    `model.context` and the gradient mode are restored before each step is handed out.

    Raises:
        InputError: the model's logits are not finite, or another generation uses the prompt cache.
    """
    begun = time.perf_counter()
    rngs = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    room = [min(request.max_new_tokens, model.cfg.n_ctx - len(row)) for row in request.rows]
    live = [i for i, n in enumerate(room) if n > 0]
    if not live:
        return
    if prompt_cache is not None:
        prompt_cache.acquire()
    try:
        capacity = max(len(request.rows[i]) + room[i] for i in live)
        with _computing(model):
            cache, logits, shared = _read({i: request.rows[i] for i in live}, capacity, model, prompt_cache)
        decode = DecodeStep(model, cache)
        rows = {i: list(request.rows[i]) for i in live}  # prompts, and what was added to them
        chosen: Int[Tensor, " row"]
        for index in itertools.count():
            with _computing(model):
                if index and request.use_past_kv_cache:
                    logits = decode(chosen)
                elif index:
                    logits = _read({i: rows[i] for i in live}, capacity, model, None)[1]
                counts = _counts(request, [rows[i] for i in live], logits)
                chosen = request.sampling.choose(logits, [rngs[i] for i in live], counts)
                tokens = _finite(model, chosen, index)
                for i, token in zip(live, tokens, strict=True):
                    rows[i].append(token)
                logprobs = logprob(logits, chosen).tolist() if request.logprobs else []
            ended = [t in request.stops or index + 1 >= room[i] for i, t in zip(live, tokens, strict=True)]
            yield GenerationStep(index, live, tokens, logprobs, ended, time.perf_counter() - begun, shared)
            going = [j for j, done in enumerate(ended) if not done]
            if not going:
                return
            if len(going) < len(live):
                unfinished = torch.tensor(going)
                cache.select(unfinished)
                live, chosen = [live[j] for j in going], chosen[unfinished.to(chosen.device)]
            if prompt_cache is not None:
                prompt_cache.note_hooks(model)
    finally:
        if prompt_cache is not None:
            prompt_cache.release()


def _counts(
    request: Request, rows: Sequence[Sequence[int]], logits: Float[Tensor, "row d_vocab"]
) -> Int[Tensor, "row d_vocab"] | None:
    """Return how often each token is in each row, or None where no penalty needs it."""
    return token_counts(rows, logits.shape[-1], logits.device) if request.sampling.has_penalty else None


@contextmanager
def _computing(model: Any) -> Iterator[None]:
    """Switch gradients off within the context, and restore the model's pass context at its end."""
    with torch.no_grad(), model.within(model.context):
        yield


def _read(
    prompts: dict[int, list[int]], capacity: int, model: Any, prompt_cache: PromptCache | None
) -> tuple[KVCache, Float[Tensor, "row d_vocab"], int]:
    """Return a cache that holds the prompts, the logits after each of them, and how many tokens were shared.

    prompts: the ids of each, by the number of its row.
    """
    rows, numbers = list(prompts.values()), torch.tensor(list(prompts))
    # Hooks see sequences by the number of their row, and may draw or record for each row separately.
    separate = len(rows) > 1 and bool(installed_hooks(model))
    unique = rows if separate else [list(row) for row in dict.fromkeys(map(tuple, rows))]
    if prompt_cache is None or separate:
        cache, reused = KVCache(model.cfg, len(unique), capacity, dtype=model.dtype, device=model.devices), 0
    else:
        cache, reused = prompt_cache.prepare(model, unique[0], capacity)
    if len(unique) == len(rows):
        cache.rows = numbers
    logits = read_prompts(model, cache, [row[reused:] for row in unique])
    shared = sum(map(len, rows)) - sum(map(len, unique)) + reused
    if len(unique) < len(rows):
        places = {tuple(row): i for i, row in enumerate(unique)}
        index = torch.tensor([places[tuple(row)] for row in rows])
        cache = cache if prompt_cache is None else deepcopy(cache)  # the conversation stays as it is
        cache.select(index)
        cache.rows, logits = numbers, logits[index.to(logits.device)]
    return cache, logits, shared


def read_prompts(model: Any, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "row d_vocab"]:
    """Return the logits after the last token of each prompt, after adding the prompts to the cache chunk by chunk."""
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
        logits: Tensor = model.unembed(model.ln_final(last))[:, 0]
        return logits


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
