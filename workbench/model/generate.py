"""Generation: batches of unequal prompts, greedy or sampled, each row as if it were alone.

    for step in model.generate_stream(prompt, temperature=1.0, samples=4):
        print(step.rows, step.tokens, step.elapsed_s)

`generate` returns everything at the end, `generate_stream` one step after the other; both choose the same tokens. A
row's samples come from a generator seeded with (seed, row), so neither the batch nor the rows that stop earlier change
what it generates. The choice is made on the model's device; one step copies one number a row to the host.
"""

import inspect
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.model.generation_loop import GenerationStep, Request, generation_steps
from workbench.model.inputs import need_tokenizer, read_batch
from workbench.model.prompt_cache import PromptCache
from workbench.model.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])
_CACHE = "model.run_with_cache(output, names_filter=…, device=…) gives the activations of a generated text"
# options of TransformerLens and Hugging Face, and what does the same here
_OTHER_WAYS = {
    "output_logits": "model(output) gives the logits of all tokens, and generate_stream each token's log-probability",
    "return_cache": _CACHE,
    "names_filter": _CACHE,
    "device": _CACHE,
    "return_input_tokens": "model.to_tokens(text) gives the ids of an input",
    "stop_strings": "stop=[model.to_single_token(text)] ends a row after a token",
    "stopping_criteria": "leave a loop over model.generate_stream(…) where it should stop",
    "num_return_sequences": "use samples",
    "max_length": "use max_new_tokens",
    "pad_token_id": "rows are lists of their own ids, or a tensor that the tokenizer's padding token fills",
    "verbose": "every step is yielded, so print what you need of it",
}


class UnknownOptionError(InputError, TypeError):
    """An option that a function does not have."""


def prepare(
    model: Any,
    prompts: Any,
    max_new_tokens: int = 256,
    *,
    temperature: int | float | None = None,
    do_sample: bool | None = None,
    top_k: int | None = None,
    top_p: int | float | None = None,
    min_p: int | float | None = None,
    freq_penalty: int | float = 0.0,
    repetition_penalty: int | float = 1.0,
    use_past_kv_cache: bool = True,
    samples: int = 1,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] | None = None,
    stop_at_eos: bool = True,
    eos_token_id: int | Collection[int] | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    attention_mask: Any = None,
    prompt_cache: PromptCache | None = None,
) -> Request:
    """Return the checked request of a generation, with a row and a seed for each sample.

    temperature 0, the default, takes the most probable token. `do_sample`, `top_k`, `top_p`, `min_p` or `freq_penalty`
    without a temperature sample at temperature 1. repetition_penalty above 1 makes tokens that a row has, prompt
    included, less probable; freq_penalty does so for each time that the row has them. `stop` and `eos_token_id` replace
    the tokenizer's stop tokens; with `stop_at_eos=False` only `stop` ends a row. `seed` is one number for the call, or
    one for each row. With several `samples`, every prompt is read once and has that many rows, one after the other. A
    row also ends at max_new_tokens, or at the end of the context. use_past_kv_cache=False computes the whole row again
    for every token: hooks see all of it, and the result is the same but for rounding. padding_side, attention_mask:
    what of a tensor's rows is padding, as in `forward`. prompt_cache: reuse what an
    earlier call with it has read of the prompt.

    Raises:
        InputError: a prompt or an option is not valid.
    """
    sampling = Sampling.of(
        temperature,
        do_sample=do_sample,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        freq_penalty=freq_penalty,
        repetition_penalty=repetition_penalty,
    )
    stops = _stops(model, stop, eos_token_id, stop_at_eos)
    batch = read_batch(
        model, prompts, prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask
    )
    prompt_rows = batch.rows()
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise InputError(f"max_new_tokens {max_new_tokens!r}: expected a whole number from 0")
    if type(samples) is not int or samples < 1:
        raise InputError(f"samples {samples!r}: expected a whole number from 1")
    if samples > 1 and sampling.temperature == 0:
        raise InputError(
            f"samples={samples} at temperature 0 would give {samples} equal answers: set a temperature above 0"
        )
    rows = [row for row in prompt_rows for _ in range(samples)]
    seeds = [seed * 1_000_003 + i for i in range(len(rows))] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != len(rows):
        raise InputError(f"{len(seeds)} seeds for {len(rows)} prompts: pass one number, or one for each prompt")
    if prompt_cache is not None and any(row != rows[0] for row in rows):
        raise InputError(
            "a prompt cache serves one prompt or several samples of it, and these prompts differ: leave the cache out"
        )
    if prompt_cache is not None and not use_past_kv_cache:
        raise InputError("a prompt cache with use_past_kv_cache=False: leave one of them out")
    return Request(rows, seeds, max_new_tokens, sampling, stops, use_past_kv_cache=use_past_kv_cache)


def with_options_of(source: Callable[..., Any]) -> Callable[[F], F]:
    """Return a decorator that shows the keyword options of `source` in place of `**options` in the signature."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [p for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = [p for p in options if p.name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return decorate


@with_options_of(prepare)
def generate(
    model: Any,
    prompts: Any,
    max_new_tokens: int = 256,
    *,
    return_type: Literal["input", "str", "tokens", "new_tokens"] = "input",
    on_step: Callable[[GenerationStep], None] | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """Generate continuations of prompts; the options are those of `prepare`.

    With return_type "input", a text gives a text and a tensor [batch pos] gives a tensor, both with the prompt; a list
    of rows of ids gives the new ids of each row, the stop token included. "str", "tokens" and "new_tokens" ask for
    texts, a tensor, or lists of new ids. Rows of a tensor that end early are filled with the padding token. on_step:
    called with every step as it is generated. verbose shows a progress bar.

    Raises:
        InputError: a prompt or an option is not valid, or the model's logits are not finite.
    """
    if return_type not in ("input", "str", "tokens", "new_tokens"):
        raise InputError(f"return_type {return_type!r} is unknown: use 'input', 'str', 'tokens' or 'new_tokens'")
    _check_options("generate", options)
    request = prepare(model, prompts, max_new_tokens, **options)
    prompt_cache, samples = options.get("prompt_cache"), options.get("samples", 1)
    new: list[list[int]] = [[] for _ in request.rows]
    with _progress(max_new_tokens, verbose) as bar, closing(generation_steps(model, request, prompt_cache)) as steps:
        for step in steps:
            for row, token in zip(step.rows, step.tokens, strict=True):
                new[row].append(token)
            bar.update(1)
            if on_step is not None:
                on_step(step)
    return _returned(model, prompts, request.rows, new, return_type, samples)


@with_options_of(prepare)
def generate_stream(
    model: Any, prompts: Any, max_new_tokens: int = 256, *, logprobs: bool = True, **options: Any
) -> Generator[GenerationStep, None, None]:
    """Return an iterator over the steps of a generation; the options are those of `prepare`.

    Options are checked at once, and the prompt is read when the first step is asked for. Closing the iterator, or
    leaving a loop over it, ends the work. Hooks and interventions act on the steps that are taken while they are on
    the model. logprobs: with the log-probability of every token.

    Raises:
        InputError: a prompt or an option is not valid; at a step, the model's logits are not finite.
    """
    _check_options("generate_stream", options)
    request = prepare(model, prompts, max_new_tokens, **options)
    return generation_steps(model, replace(request, logprobs=logprobs), options.get("prompt_cache"))


def _check_options(function: str, options: Collection[str]) -> None:
    """Refuse an option that there is not, and name what does the same.

    Raises:
        UnknownOptionError: an option is unknown.
    """
    known = [name for name, p in inspect.signature(prepare).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            way = _OTHER_WAYS.get(name) or f"use {', '.join(known)}"
            raise UnknownOptionError(f"{function} has no option {name!r}: {way}")


def _stops(
    model: Any, stop: Collection[int] | None, eos: int | Collection[int] | None, stop_at_eos: bool
) -> frozenset[int]:
    ending = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    if stop is None and eos is None and stop_at_eos and model.tokenizer is not None:
        ending = frozenset(model.tokenizer.stop_ids)
    return frozenset(stop or ()) | (ending if stop_at_eos else frozenset())


def _progress(total: int, verbose: bool) -> Any:
    from tqdm.auto import tqdm  # late: a tenth of a second

    return tqdm(total=total, disable=not verbose, desc="generate", unit="token")


def _returned(
    model: Any, given: Any, rows: list[list[int]], new: list[list[int]], return_type: str, samples: int
) -> Any:
    """Return what `return_type` asks for; one text or row of ids gives one, unless there are several samples of it."""
    texts = isinstance(given, str) or (isinstance(given, Sequence) and bool(given) and isinstance(given[0], str))
    if return_type == "input":
        return_type = "str" if texts else "tokens" if isinstance(given, Tensor) else "new_tokens"
    if return_type == "new_tokens":
        return new
    every = [row + more for row, more in zip(rows, new, strict=True)]
    if return_type == "str":
        decoded = [need_tokenizer(model).decode(row) for row in every]
        one = samples == 1 and (isinstance(given, str) or (isinstance(given, Tensor) and given.dim() == 1))
        return decoded[0] if one else decoded
    filler = 0 if model.tokenizer is None else model.tokenizer.pad_token_id or 0
    tensors = [torch.tensor(row) for row in every]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(model.device)
    return padded[0] if isinstance(given, Tensor) and given.dim() == 1 and samples == 1 else padded
