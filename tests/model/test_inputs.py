"""What a pass is given becomes one checked tensor; every wrong input is one error that states what was expected."""

from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.model.inputs import check_ids, encode, pad, read_batch
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32, device="cpu")
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_texts_and_of_ids_are_padded_alike(side: str, nano: GptOss) -> None:
    texts = read_batch(nano, ["12", "345"], padding_side=side)
    ids = read_batch(nano, [encode(nano, "12", None), encode(nano, "345", None)], padding_side=side)
    assert torch.equal(texts.tokens, ids.tokens)
    assert (texts.n_left, texts.n_real) == (ids.n_left, ids.n_real) == ([1 if side == "left" else 0, 0], [2, 3])
    assert texts.rows() == [encode(nano, "12", None), encode(nano, "345", None)]
    assert texts.padded_left == (side == "left")


def test_padding_of_a_tensor_counts_as_tokens_until_its_side_is_named(nano: GptOss) -> None:
    tokens, _, _ = pad(nano, [[1], [1, 2]], "left")
    assert read_batch(nano, tokens).n_real == [2, 2]
    assert read_batch(nano, tokens, padding_side="left").n_left == [1, 0]
    assert read_batch(nano, tokens, attention_mask=[[0, 1], [1, 1]]).n_left == [1, 0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "no tokens"),
        ("", "row 0 is empty"),
        (["1", 2], "texts or of ids, not both"),
        ([[1], "2"], "texts or of ids, not both"),
        ([[1], []], "row 1 is empty"),
        (1.5, "token ids are whole numbers, got float"),
        (np.zeros((1, 1, 1), int), "ids have the axes"),
        ({"ids": 1}, "expected text or token ids"),
        ([99999], "token id 99999 is not in the vocabulary"),
        ([-1], "token id -1 is not in the vocabulary"),
    ],
)
def test_a_wrong_input_is_one_error(given: Any, reason: str, nano: GptOss) -> None:
    with pytest.raises(InputError, match=reason):
        read_batch(nano, given)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([[1, 1]], "attention_mask has shape"),
        ([[1, 0, 1]], "padding between tokens"),
        ([[0, 0, 0]], "no token"),
        ([[1, 2, 1]], "values other than 0"),
    ],
)
def test_a_wrong_mask_is_one_error(mask: Any, reason: str, nano: GptOss) -> None:
    with pytest.raises(InputError, match=reason):
        read_batch(nano, [1, 2, 3], attention_mask=mask)


def test_ids_keep_their_shape(nano: GptOss) -> None:
    assert check_ids(torch.zeros(2, 1, 3, dtype=torch.int32), nano).shape == (2, 1, 3)
