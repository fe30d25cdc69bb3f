"""Cached equals recomputed, batched equals alone, seeds fix samples, stop tokens end rows, options are checked once."""

import inspect
from typing import Any

import pytest
import torch
from transformer_lens.utilities import sample_logits

from tests.model.conftest import BASE, random_model
from workbench.errors import InputError
from workbench.model.cache import KVCache
from workbench.model.transformer import GptOss

PROMPTS = [[5, 9, 2], list(range(40)), [7], [3] * 21]


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE)


def new_cache(batch: int, capacity: int = 128) -> KVCache:
    return KVCache(BASE, batch, capacity, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def test_a_prefix_in_the_cache_gives_the_same_logits(base: GptOss) -> None:
    x = torch.randint(BASE.d_vocab, (2, 60), generator=torch.Generator().manual_seed(3))
    complete = base(x)
    cache = new_cache(2)
    parts = [base(part, cache=cache) for part in x.split([23, 1, 1, 35], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), complete, rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [60, 60]


@torch.no_grad()
def test_a_truncated_cache_forgets_what_was_cut(base: GptOss) -> None:
    x = torch.randint(BASE.d_vocab, (1, 30), generator=torch.Generator().manual_seed(4))
    cache = new_cache(1)
    base(torch.cat([x[:, :20], x[:, :7]], 1), cache=cache)
    cache.truncate(torch.tensor([20]))
    torch.testing.assert_close(base(x[:, 20:], cache=cache), base(x)[:, 20:], rtol=1e-4, atol=1e-5)


def greedy_by_recomputing(model: GptOss, prompt: list[int], n: int) -> list[int]:
    row = list(prompt)
    for _ in range(n):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@torch.no_grad()
def test_greedy_generation_equals_recomputing_every_token(base: GptOss) -> None:
    assert base.generate([PROMPTS[1]], max_new_tokens=12, stop=()) == [greedy_by_recomputing(base, PROMPTS[1], 12)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_unequal_prompts_equals_one_by_one(base: GptOss, temperature: float) -> None:
    seeds = [11, 12, 13, 14]
    together = base.generate(PROMPTS, max_new_tokens=20, temperature=temperature, seed=seeds, stop=range(0, 20))
    alone = [
        base.generate([p], max_new_tokens=20, temperature=temperature, seed=[s], stop=range(0, 20))[0]
        for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    assert len({len(out) for out in together}) > 1, "the rows should stop at different times, or nothing is tested"


def test_the_stop_token_ends_a_row_and_is_included(base: GptOss) -> None:
    first = base.generate([PROMPTS[0]], max_new_tokens=8, stop=())[0]
    assert base.generate([PROMPTS[0]], max_new_tokens=8, stop={first[2]})[0] == first[: first.index(first[2]) + 1]


def test_a_seed_fixes_the_samples_and_another_changes_them(base: GptOss) -> None:
    a, b, c = (base.generate(PROMPTS, max_new_tokens=10, temperature=1.0, seed=s, stop=()) for s in (0, 0, 1))
    assert a == b != c


def test_generation_ends_at_the_context(base: GptOss) -> None:
    assert [len(out) for out in base.generate([[1] * 508, [1] * 512], max_new_tokens=50, stop=())] == [4, 0]


def test_samples_follow_the_model_s_distribution(base: GptOss) -> None:
    with torch.no_grad():
        want = base(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1)
    drawn = base.generate([PROMPTS[0]] * 3000, max_new_tokens=1, temperature=1.0, stop=())
    got = torch.bincount(torch.tensor(drawn).flatten(), minlength=BASE.d_vocab) / 3000
    assert (got - want).abs().sum() / 2 < 0.1
    colder = base.generate([PROMPTS[0]] * 300, max_new_tokens=1, temperature=0.05, stop=())
    assert (torch.tensor(colder) == want.argmax()).float().mean() > (
        torch.tensor(drawn) == want.argmax()
    ).float().mean()


def test_an_empty_prompt_is_refused(base: GptOss) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        base.generate([[1], []])


@torch.no_grad()
def test_without_the_cache_hooks_see_the_whole_row_and_the_tokens_are_the_same(base: GptOss) -> None:
    lengths: list[int] = []
    hooks = [("hook_embed", lambda x, hook: lengths.append(x.shape[1]))]
    with base.hooks(hooks):
        cached = base.generate([PROMPTS[0]], 5, stop=())
    assert lengths == [3, 1, 1, 1, 1]
    lengths.clear()
    with base.hooks(hooks):
        again = base.generate(input=[PROMPTS[0]], max_new_tokens=5, stop=(), use_past_kv_cache=False)
    assert lengths == [3, 4, 5, 6, 7]
    assert again == cached
    assert base.generate(PROMPTS, 5, stop=(), use_past_kv_cache=False) == base.generate(PROMPTS, 5, stop=())


@torch.no_grad()
def test_penalties_count_the_prompt_and_what_was_generated(base: GptOss) -> None:
    prompt = [7, 7, 7, 9]
    never = base.generate([prompt], 8, stop=(), repetition_penalty=1e6)[0]
    assert len({*prompt, *never}) == 2 + len(never), "a large penalty repeats nothing"
    for options in ({"repetition_penalty": 1.4}, {"freq_penalty": 0.8, "top_k": 1}):
        rows, row = base.generate([prompt, PROMPTS[3]], 8, stop=(), **options), list(prompt)
        for _ in range(8):
            logits = base(torch.tensor([row]))[:, -1]
            settings = {"temperature": 1.0 if "top_k" in options else 0.0, **options}
            row.append(int(sample_logits(logits, tokens=torch.tensor([row]), **settings)))
        assert rows[0] == row[len(prompt) :]


def test_the_options_are_in_the_signatures(base: GptOss) -> None:
    of_generate, of_stream = (inspect.signature(f).parameters for f in (base.generate, base.generate_stream))
    assert list(of_generate)[:2] == list(of_stream)[:2] == ["input", "max_new_tokens"]
    assert {"temperature", "top_p", "samples", "seed", "stop_at_eos", "prompt_cache"} <= of_generate.keys()
    assert of_generate.keys() - of_stream.keys() == {"return_type", "on_step", "verbose"}
    assert of_stream.keys() - of_generate.keys() == {"logprobs"}
    assert of_generate["samples"].default == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens -1: expected a whole number from 0"),
        ({"samples": 2}, "samples=2 at temperature 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": float("nan")}, "temperature nan: expected a finite number"),
    ],
)
def test_both_ways_to_generate_refuse_the_same(base: GptOss, options: dict[str, Any], message: str) -> None:
    for generate in (base.generate, base.generate_stream):
        with pytest.raises(InputError, match=message):
            generate([PROMPTS[0]], **options)
        with pytest.raises(TypeError, match="tempreature"):
            generate([PROMPTS[0]], tempreature=1.0)
