"""The tokens of a GGUF file are checked against harmony's, and merges rebuild the tokens."""

from pathlib import Path

import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.harmony.vocabulary import MARKS, tokenizer_of_tokens
from workbench.model.formats.gguf_merges import merges, unmerged, vocabulary_tokens


def test_the_tokens_of_the_file_are_those_of_harmony() -> None:
    published = wb.harmony.tokenizer()
    tokens = vocabulary_tokens(published, published.d_vocab)
    read = tokenizer_of_tokens(Path("m.gguf"), tokens, None, "template")
    assert (read.digest, read.chat_template, published.chat_template) == (published.digest, "template", None)
    for id, message in ((published.special["<|start|>"], "expected '<|start|>'"), (997 * 3, "of o200k_harmony")):
        spoilt = [*tokens[:id], "other", *tokens[id + 1 :]]
        with pytest.raises(InputError, match=message):
            tokenizer_of_tokens(Path("m.gguf"), spoilt)
    with pytest.raises(InputError, match=r"3 tokens and no tokenizer.huggingface.json"):
        tokenizer_of_tokens(Path("m.gguf"), tokens[:3])
    assert all(f"<|{mark}|>" in tokens for mark in MARKS)


def test_merges_rebuild_tokens() -> None:
    tokens = ["<|end|>", "a", "b", "c", "ab", "abc", "abab", "xyz"]
    assert merges(tokens, {0}) == ["a b", "ab c", "ab ab"]
    assert [tokens[id] for id in unmerged(tokens, {0}, merges(tokens, {0}))] == ["xyz"]
