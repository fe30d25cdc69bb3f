"""Tokens are selected over the rows of a batch, and reading them out leaves the model unchanged."""

from typing import Any

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.experiments.token_selection import read_out, residual, select_tokens
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", device="cpu", dtype=torch.float32)


def fail(activation: Any, hook: Any) -> None:
    raise RuntimeError("a hook that fails")


@torch.no_grad()
@pytest.mark.parametrize("point", ["ln_final.hook_normalized", "unembed.hook_out"])
def test_a_hook_that_raises_leaves_the_context_of_the_pass(model: GptOss, point: str) -> None:
    """The context of the selected tokens must not stay: later logits would be read at the wrong positions."""
    tokens = torch.arange(20).reshape(2, 10)
    chosen = select_tokens(model, tokens, at=[3, 5])
    x = residual(model, chosen)
    context, expected = model.context, read_out(model, x, chosen.column)
    with pytest.raises(RuntimeError, match="a hook that fails"), model.hooks(fwd_hooks=[(point, fail)]):
        read_out(model, x, chosen.column)
    assert model.context is context
    assert torch.equal(read_out(model, x, chosen.column), expected)


def test_selecting_no_token_is_refused(model: GptOss) -> None:
    with pytest.raises(InputError, match="no token of these 2 sequences is selected"):
        select_tokens(model, torch.arange(20).reshape(2, 10), at=[9], n_real=[5, 5])
