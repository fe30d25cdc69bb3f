"""A tokenizer under Hugging Face's names: calling, padding, truncation and conversions."""

from typing import Any

import numpy as np
import pytest
import torch

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.tokenizer_names import padding_side, plain_ids

WORDS = harmony.tokenizer("data/nano")


def test_a_call_reads_special_names_as_tokens_and_encode_does_not() -> None:
    end = WORDS.special["<|end|>"]
    assert WORDS("1<|end|>")["input_ids"] == [*WORDS.encode("1"), end]
    with pytest.raises(InputError, match="cannot express the character '<'"):
        WORDS.encode("1<|end|>")  # nano lacks the characters; the published vocabulary has them
    published = harmony.tokenizer()
    assert published.special["<|end|>"] not in published.encode("1<|end|>")
    assert WORDS.tokenize("1<|end|>") == ["1", "<|end|>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_side_of_the_tokenizer(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WORDS, "padding_side", side)
    out = WORDS(["12+34", "1"], padding=True, return_tensors="pt")
    assert out["input_ids"].shape == (2, 5)
    row, real = out["input_ids"][1].tolist(), WORDS.encode("1")
    filler = [WORDS.pad_token_id] * 4
    assert row == ([*filler, *real] if side == "left" else [*real, *filler])
    assert out["attention_mask"][1].tolist() == ([0] * 4 + [1] if side == "left" else [1] + [0] * 4)
    assert isinstance(out["input_ids"], torch.Tensor)
    assert isinstance(WORDS("1", return_tensors="np")["input_ids"], np.ndarray)


def test_rows_of_unequal_length_fit_no_tensor_without_padding() -> None:
    with pytest.raises(InputError, match="1 to 5 tokens and fit no tensor: pass padding=True"):
        WORDS(["12+34", "1"], return_tensors="pt")


def test_rows_are_truncated_to_a_length() -> None:
    assert WORDS("12+34", truncation=True, max_length=2)["input_ids"] == WORDS.encode("12")
    for options in ({"truncation": True}, {"max_length": 2}):
        with pytest.raises(InputError, match="truncation needs both"):
            WORDS("12+34", **options)


def test_conversions_are_inverse() -> None:
    ids = list(range(len(WORDS)))
    tokens = WORDS.convert_ids_to_tokens(ids)
    assert [WORDS.get_vocab()[token] for token in tokens] == ids
    assert WORDS.convert_tokens_to_ids("7") == WORDS.encode("7")[0]
    assert WORDS.batch_decode([WORDS.encode("1"), WORDS.encode("2")]) == ["1", "2"]
    with pytest.raises(InputError, match="is 2 tokens, expected one"):
        WORDS.convert_tokens_to_ids("12")


@pytest.mark.parametrize("ids", [7, [7], np.array([7]), torch.tensor([7]), torch.tensor(7), range(7, 8)])
def test_ids_are_read_from_any_container(ids: Any) -> None:
    assert plain_ids(ids) == [7]


@pytest.mark.parametrize("ids", [[-1], ["7"], [7.0], "7"])
def test_what_is_no_id_is_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="is not a token id"):
        plain_ids(ids)


def test_there_is_no_third_side() -> None:
    assert padding_side("left") == "left"
    with pytest.raises(InputError, match="padding_side 'both'"):
        padding_side("both")
