"""A token set holds what its words say, on a whole stream and on every beginning of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from workbench import harmony
from workbench.errors import InputError

MESSAGES = [
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "channel": "analysis", "content": "1+2=3"},
    {"role": "assistant", "channel": "final", "content": "3"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[[Path], Path]) -> harmony.Tokenizer:
    return harmony.tokenizer(write_tokenizer(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def ids(tokenizer: harmony.Tokenizer) -> list[int]:
    out: list[int] = []
    for message in MESSAGES:
        out += [tokenizer.mark("start"), *tokenizer.encode(message["role"])]
        out += [tokenizer.mark("channel"), *tokenizer.encode(message["channel"])] if "channel" in message else []
        out += [tokenizer.mark("message"), *tokenizer.encode(message["content"]), tokenizer.mark("end")]
    return out


def words(tokenizer: harmony.Tokenizer, ids: list[int], **which: object) -> str:
    mask = harmony.token_set(tokenizer=tokenizer, **which)(ids)  # type: ignore[arg-type]
    return "".join(tokenizer.decode([i]) for i, inside in zip(ids, mask, strict=True) if inside)


@pytest.mark.parametrize(
    ("which", "text"),
    [
        (dict(channel="analysis"), "1+2=3"),
        (dict(channel=["prompt", "final"]), "1+23"),
        (dict(role="user"), "<|start|>user<|message|>1+2<|end|>"),
        (dict(part="message_mark"), "<|message|>" * 3),
        (dict(role="assistant", part="content", message=1), "1+2=3"),
        (dict(message=-1, part="content"), "3"),
        (dict(message=[0, 9], part="content"), "1+2"),
        (dict(channel="analysis", every=2), "123"),
        (dict(channel="analysis", last=2), "=3"),
        (dict(channel="analysis", every=2, last=1), "3"),
        (dict(position=[0, 1, -1]), "<|start|>user<|end|>"),
        (dict(position=slice(3), part="start"), "<|start|>"),
    ],
)
def test_it_holds_what_its_words_say(
    tokenizer: harmony.Tokenizer, ids: list[int], which: dict[str, object], text: str
) -> None:
    assert words(tokenizer, ids, **which) == text


def test_sets_combine(tokenizer: harmony.Tokenizer, ids: list[int]) -> None:
    analysis = harmony.token_set(tokenizer=tokenizer, channel="analysis")
    late = harmony.token_set(tokenizer=tokenizer, position=slice(12, None))
    a, b = analysis(ids), late(ids)
    assert np.array_equal((analysis & late)(ids), a & b)
    assert np.array_equal((analysis | late)(ids), a | b)
    assert np.array_equal((~analysis)(ids), ~a)
    assert repr(analysis & ~late) == "<tokens: (channel=analysis and not position=slice(12, None, None))>"


def test_a_beginning_is_labelled_as_the_whole(tokenizer: harmony.Tokenizer, ids: list[int]) -> None:
    final = harmony.token_set(tokenizer=tokenizer, channel=["final", "analysis"], every=2)
    complete = final(ids)
    for n in range(len(ids) + 1):
        assert np.array_equal(final(ids[:n]), complete[:n])


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (dict(channel="thinking"), r"channel \['thinking'\]: use one or several of frame, prompt, analysis"),
        (dict(role=[]), "role"),
        (dict(part="body"), "content"),
        (dict(every=0), "every=0"),
        (dict(last=0), "last=0"),
    ],
)
def test_unknown_names_are_refused(tokenizer: harmony.Tokenizer, which: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        harmony.token_set(tokenizer=tokenizer, **which)  # type: ignore[arg-type]
