"""Texts and messages of the finished run agree with its ids, and a wrong tokenizer is refused."""

from types import SimpleNamespace

import pytest

import workbench as wb
from tests.conftest import DATA
from workbench import harmony
from workbench.errors import InputError
from workbench.runs.conversations import conversation, text, tokenizer

RUN = wb.open_run(DATA / "demo.zarr")


def test_the_tokenizer_is_the_one_of_the_capture() -> None:
    words = tokenizer(RUN)
    assert words.digest == RUN.provenance["tokenizer"]["digest"]
    assert tokenizer(RUN, words) is words
    with pytest.raises(InputError, match="was captured with another tokenizer"):
        tokenizer(RUN, harmony.tokenizer())


def test_an_unknown_tokenizer_is_asked_for() -> None:
    run = SimpleNamespace(path="x.zarr", provenance={"tokenizer": {"digest": "0", "name": "other"}})
    with pytest.raises(InputError, match="'other', not found here: give tokenizer="):
        tokenizer(run)


def test_spans_of_messages_hold_their_texts() -> None:
    words, number = tokenizer(RUN), int(RUN.sequences.index[0])
    ids = RUN.sequence(number)["id"].values
    messages = conversation(RUN, number, words)
    assert [m["role"] for m in messages[-2:]] == ["assistant", "assistant"] or messages[-1]["role"] == "assistant"
    for message in messages:
        assert text(ids[message["text_span"]], words) == message["text"]
    assert messages[-1]["text"] in text(ids, words)
