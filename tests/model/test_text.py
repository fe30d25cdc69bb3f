"""Text to ids and back under TransformerLens' names, with harmony's meaning of `prepend_bos`."""

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32, device="cpu")
    return model


def test_text_and_ids_are_inverse(nano: GptOss) -> None:
    tokens = nano.to_tokens(["12+34", "7"])
    assert tokens.shape == (2, 5)
    assert nano.to_string(nano.to_tokens("12+34")[0]) == "12+34"
    assert nano.to_string(nano.to_tokens("12+34")) == ["12+34"]
    assert nano.to_str_tokens("1+2") == ["1", "+", "2"]
    assert nano.to_str_tokens(["1", "2+"]) == [["1"], ["2", "+"]]


def test_nothing_is_put_before_a_text_unless_it_is_asked_for(nano: GptOss) -> None:
    assert nano.to_tokens("1", prepend_bos=False).shape == nano.to_tokens("1").shape == (1, 1)
    if nano.tokenizer.bos_token_id is None:
        with pytest.raises(InputError, match="prepend_bos=True: the vocabulary"):
            nano.to_tokens("1", prepend_bos=True)
    else:
        assert nano.to_tokens("1", prepend_bos=True)[0, 0] == nano.tokenizer.bos_token_id


def test_the_position_of_a_token_is_the_first_or_the_last(nano: GptOss) -> None:
    assert nano.get_token_position("1", "121") == 0
    assert nano.get_token_position("1", "121", mode="last") == 2
    assert nano.get_token_position(nano.to_single_token("2"), nano.to_tokens("121")) == 1
    with pytest.raises(InputError, match="is not among"):
        nano.get_token_position("7", "121")
    with pytest.raises(InputError, match="got 2 rows"):
        nano.get_token_position("1", ["1", "2"])


def test_directions_give_the_logits_of_their_tokens(nano: GptOss) -> None:
    with torch.no_grad():
        logits, cache = nano.run_with_cache("12+34")
        normalized = cache["ln_final.hook_normalized"]
        for tokens in ("7", 7, ["7", "8"], torch.tensor([[7, 8], [1, 2]])):
            directions = nano.tokens_to_residual_directions(tokens)
            ids = (
                torch.as_tensor([nano.to_single_token(t) for t in tokens] if isinstance(tokens, list) else tokens)
                if not isinstance(tokens, str)
                else torch.tensor(nano.to_single_token(tokens))
            )
            got = torch.einsum("d,...d->...", normalized[0, -1], directions)
            torch.testing.assert_close(got, logits[0, -1][ids], rtol=1e-4, atol=1e-4)


def test_a_text_of_several_tokens_is_no_single_token(nano: GptOss) -> None:
    with pytest.raises(InputError, match="is 2 tokens, expected one"):
        nano.to_single_token("12")
    with pytest.raises(InputError, match="is not in the vocabulary"):
        nano.to_single_str_token(99999)
