"""A stream of steps gives the tokens of a batch; it restores what it changes, ends when closed, and shares prompts."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.model.conftest import BASE, random_model
from tests.model.test_generate import PROMPTS
from workbench.errors import InputError
from workbench.hooks.interventions import applied, forbid
from workbench.hooks.recorders import SequenceRecorder
from workbench.model.generation_loop import GenerationSpeed, GenerationStep
from workbench.model.prompt_cache import PromptCache
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE)


def collected(steps: Iterator[GenerationStep], rows: int) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for row, token in zip(step.rows, step.tokens, strict=True):
            out[row].append(token)
    return out


SAMPLED: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "stop": range(20)}


@pytest.mark.parametrize("options", [SAMPLED, {**SAMPLED, "temperature": 0.0}, {**SAMPLED, "top_k": 7, "min_p": 0.01}])
def test_a_stream_has_the_tokens_of_a_batch(base: GptOss, options: dict[str, Any]) -> None:
    want = base.generate(PROMPTS, seed=3, **options)
    assert len({len(new) for new in want}) > 1, "the rows should stop at different times, or nothing is tested"
    assert collected(base.generate_stream(PROMPTS, seed=3, **options), len(PROMPTS)) == want
    heard: list[GenerationStep] = []
    assert base.generate(PROMPTS, seed=3, on_step=heard.append, **options) == want
    assert collected(iter(heard), len(PROMPTS)) == want
    by_column = [[new[i] for new in want if i < len(new)] for i in range(20)]  # a negative control: rows that close up
    wrong = [[column[row] for column in by_column if row < len(column)] for row in range(len(PROMPTS))]
    assert wrong != want


def test_log_probabilities_are_those_of_a_pass_over_the_answer(base: GptOss) -> None:
    steps = list(base.generate_stream([PROMPTS[1]], max_new_tokens=12, temperature=2.0, top_k=5, stop=()))
    new = [step.tokens[0] for step in steps]
    with torch.no_grad():
        logits = base(torch.tensor([PROMPTS[1] + new]))[0, len(PROMPTS[1]) - 1 : -1]
    want = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([step.logprobs[0] for step in steps]), want, rtol=1e-4, atol=1e-4)
    tempered = (logits / 2).log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
    assert (tempered - want).abs().max() > 0.01, "a negative control: the sampling distribution is another one"


def test_steps_say_which_rows_end_and_when(base: GptOss) -> None:
    steps = list(base.generate_stream(PROMPTS, seed=3, **SAMPLED))
    assert [step.index for step in steps] == list(range(len(steps)))
    ended = [row for step in steps for row, done in zip(step.rows, step.finished, strict=True) if done]
    assert sorted(ended) == list(range(len(PROMPTS)))
    for step, after in itertools.pairwise(steps):
        assert after.rows == [row for row, done in zip(step.rows, step.finished, strict=True) if not done]
        assert 0 < step.elapsed_s < after.elapsed_s


def test_the_gradient_mode_and_the_context_are_the_callers_between_steps(base: GptOss) -> None:
    base(torch.tensor([[1, 2]]))
    before, inside = base.context, set()
    with base.hooks(fwd_hooks=[("hook_embed", lambda t, hook: inside.add(torch.is_grad_enabled()))]):
        base.generate(PROMPTS, max_new_tokens=3, stop=())
    assert inside == {False}
    for step in base.generate_stream(PROMPTS, max_new_tokens=3, stop=()):
        assert torch.is_grad_enabled()
        assert base.context is before
        base(torch.tensor([[step.tokens[0]]]))  # another pass between two steps changes nothing
        before = base.context

    def leaking() -> Iterator[int]:  # a negative control
        with torch.no_grad():
            yield 1

    assert [torch.is_grad_enabled() for _ in leaking()] == [False]
    want = base.generate(PROMPTS, max_new_tokens=3, stop=())
    two = [base.generate_stream([row], max_new_tokens=3, stop=()) for row in PROMPTS]
    interleaved = list(zip(*two, strict=True))
    assert [[steps[i].tokens[0] for steps in interleaved] for i in range(len(PROMPTS))] == want


def test_closing_a_stream_ends_the_work(base: GptOss) -> None:
    passes: list[int] = []
    with base.hooks(fwd_hooks=[("hook_embed", lambda t, hook: passes.append(t.shape[1]))]):
        stream = base.generate_stream([PROMPTS[0]], max_new_tokens=12, stop=())
        assert not passes, "nothing runs before the first step is asked for"
        for step in stream:
            if step.index == 4:
                break
        stream.close()
        assert passes == [3, 1, 1, 1, 1]
        assert list(stream) == []
        base.generate([PROMPTS[0]], max_new_tokens=12, stop=())
        assert len(passes) == 5 + 12, "a negative control: without closing all passes run"


def test_an_error_of_the_callback_ends_the_work_at_once(base: GptOss) -> None:
    def failing(step: GenerationStep) -> None:
        raise RuntimeError(f"step {step.index}")

    before = torch.is_grad_enabled(), base.context
    with pytest.raises(RuntimeError, match="step 0") as failure:
        base.generate([PROMPTS[0]], max_new_tokens=12, stop=(), on_step=failing)
    frames = {frame.name: frame for frame in failure.traceback}
    assert frames["generate"].frame.f_locals["steps"].gi_frame is None, "the generator is left open"
    assert (torch.is_grad_enabled(), base.context) == before


def widths_of(model: GptOss, run: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """Return what `run()` returns, and rows and columns of every pass, counted without a hook."""
    seen: list[tuple[int, ...]] = []
    original = model.residual

    def counted(tokens: Any, **options: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return original(tokens, **options)

    model.residual = counted  # type: ignore[method-assign]
    try:
        return run(), seen
    finally:
        del model.residual


def test_samples_share_their_prompt(base: GptOss) -> None:
    prompt, other = list(range(40)), [7, 8, 9]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "stop": range(10), "seed": 5}
    alone = [
        base.generate([p], **{**options, "seed": [5 * 1_000_003 + i]})[0]
        for i, p in enumerate([prompt] * 3 + [other] * 3)
    ]
    together, passes = widths_of(base, lambda: base.generate([prompt, other], samples=3, **options))
    assert together == alone
    assert len({tuple(row) for row in together}) > 2
    assert passes[0] == (2, 40)
    assert all(rows <= 6 and columns == 1 for rows, columns in passes[1:])
    stream = base.generate_stream([prompt], samples=3, **options)
    assert next(stream).shared_tokens == 80
    stream.close()
    recorder = SequenceRecorder(base, {"blocks.0.attn.hook_sink": torch.float32})
    with base.hooks(fwd_hooks=recorder.fwd_hooks):  # hooks see every row
        _, hooked = widths_of(base, lambda: base.generate([prompt], samples=3, **options))
    assert hooked[0] == (3, 40)
    assert [len(taken["blocks.0.attn.hook_sink"]) for taken in recorder.take()] == [39 + len(row) for row in alone[:3]]
    with pytest.raises(InputError, match="3 equal answers"):
        base.generate([prompt], samples=3)


def test_a_later_turn_reads_only_what_is_new(base: GptOss) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "stop": ()}
    prompt, cache = list(range(60)), PromptCache()
    answer = base.generate([prompt], prompt_cache=cache, **options)[0]
    assert answer == base.generate([prompt], **options)[0]
    turns = {
        "the answer and a question": ([*prompt, *answer, 5, 6, 7], 60 + 5),  # the last new token was never read
        "a question without the answer": ([*prompt, 5, 6, 7, 8], 60),
        "an edit in the middle": ([*prompt[:30], 99, *prompt[31:]], 30),
        "the same again": ([*prompt[:30], 99, *prompt[31:]], 59),
    }
    for name, (turn, shared) in turns.items():
        again, passes = widths_of(base, lambda turn=turn: base.generate([turn], prompt_cache=cache, **options)[0])
        assert passes[0] == (1, len(turn) - shared), name
        assert again == base.generate([turn], **options)[0], name
    samples = base.generate([prompt], samples=3, prompt_cache=cache, **options)
    assert samples == base.generate([prompt], samples=3, **options)
    assert widths_of(base, lambda: base.generate([prompt], prompt_cache=cache, **options))[1][0] == (1, 1)


def test_a_prompt_cache_reuses_nothing_of_other_hooks(base: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, cache = list(range(60)), PromptCache()
    options: dict[str, Any] = {"max_new_tokens": 5, "stop": ()}

    def forbidden(**more: Any) -> list[int]:
        with applied(base, forbid(range(3), [0, 1, 2])):
            new: list[list[int]] = base.generate([prompt], **options, **more)
            return new[0]

    plain, edited = base.generate([prompt], prompt_cache=cache, **options)[0], forbidden()
    assert plain != edited
    assert forbidden(prompt_cache=cache) == edited
    assert base.generate([prompt], prompt_cache=cache, **options)[0] == plain
    stream = base.generate_stream([prompt], prompt_cache=cache, **options)
    next(stream)
    with applied(base, forbid(range(3), [0, 1, 2])):
        next(stream)
    stream.close()
    assert base.generate([prompt], prompt_cache=cache, **options)[0] == plain
    broken = PromptCache()  # a negative control: a cache that never looks at hooks
    monkeypatch.setattr(PromptCache, "_same", lambda self, hooks: True)
    base.generate([prompt[:59]], prompt_cache=broken, **options)
    with applied(base, forbid(range(3), [0, 1, 2])):
        got = [s.logprobs[0] for s in base.generate_stream([prompt], prompt_cache=broken, **options)]
        want = [s.logprobs[0] for s in base.generate_stream([prompt], **options)]
    assert not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(got, want, strict=True))


def test_misuse_of_a_prompt_cache_is_refused(base: GptOss) -> None:
    cache = PromptCache()
    with pytest.raises(InputError, match="these prompts differ"):
        base.generate(PROMPTS, prompt_cache=cache)
    stream = base.generate_stream([PROMPTS[0]], prompt_cache=cache)
    next(stream)
    with pytest.raises(InputError, match="has not ended"):
        base.generate([PROMPTS[0]], prompt_cache=cache)
    next(stream)
    stream.close()
    base.generate([PROMPTS[0]], prompt_cache=cache, max_new_tokens=1)
    with pytest.raises(InputError, match="samples 0"):
        base.generate_stream([PROMPTS[0]], samples=0)  # at once, before the first step


def timed(index: int, tokens: int, elapsed_s: float) -> GenerationStep:
    return GenerationStep(index, list(range(tokens)), [1] * tokens, [], [False] * tokens, elapsed_s, 0)


def test_the_speed_with_prompts_and_without_them() -> None:
    speed = GenerationSpeed()
    assert str(speed) == "0.0 tokens/s, first token after 0.00 s"
    speed.add(timed(0, 2, 3.0))
    assert str(speed) == "0.7 tokens/s, first token after 3.00 s", "nothing follows a first token yet"
    for index in (1, 2):
        speed.add(timed(index, 2, 3.0 + index))
    assert (speed.tokens_per_s, speed.decoding_tokens_per_s, speed.first_token_s) == (6 / 5, 2.0, 3.0)
    for index in range(5):  # another generation, of one row, whose clock begins again
        speed.add(timed(index, 1, 1.0 + index))
    assert (speed.tokens, speed.elapsed_s, speed.first_token_s) == (11, 10.0, 2.0)
    assert speed.decoding_tokens_per_s == 8 / 6, "without the 2 + 1 first tokens and their 3 + 1 seconds"
    assert str(speed) == "1.1 tokens/s, first token after 2.00 s, then 1.3 tokens/s"
