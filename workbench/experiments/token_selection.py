"""The tokens that an experiment selects, and a pass over them: the rows of a batch end to end, without padding.

`at` is what interventions take for tokens: a token set (`harmony.token_set`), positions, a slice of them, or None for
every token; negative positions count from a sequence's end.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.edits import Tokens, as_set
from workbench.model.pass_context import PassContext
from workbench.model.transformer import GptOss

ROWS = 64  # logits of this many tokens at a time: 51 MB in float32 of a vocabulary of 201,088
Token = int | Int[Tensor, "batch pos"] | Literal["next"]


class SelectedTokens(NamedTuple):
    """Tokens of a batch, in the order of its rows; `column` is their place in the packed row."""

    row: Int[Tensor, "1 column"]
    lengths: list[int]
    column: Int[Tensor, " point"]
    sequence: Int[Tensor, " point"]
    position: Int[Tensor, " point"]

    def ids(self, token: Token) -> Int[Tensor, " point"]:
        """Return a token id for every selected token: one for all, those of [batch pos], or the token that follows.

        Raises:
            InputError: `token` is none of these, or no token follows a selected one.
        """
        if isinstance(token, int):
            return torch.full_like(self.column, token)
        if isinstance(token, Tensor):
            return token.cpu()[self.sequence, self.position]
        if token != "next":
            raise InputError(f"token {token!r}: give an id, ids [batch pos], or 'next'")
        if (self.position + 1 == torch.tensor(self.lengths)[self.sequence]).any():
            raise InputError(
                "no token follows the last one of a sequence: leave it out, as at=slice(0, -1) does, or name the token"
            )
        return self.row[0, self.column + 1]

    def coords(self) -> dict[str, tuple[str, object]]:
        """Return coordinates of a dataset: the position of each selected token, and the token."""
        return {
            "sequence": ("point", self.sequence.numpy()),
            "position": ("point", self.position.numpy()),
            "token": ("point", self.row[0, self.column].numpy()),
        }


def select_tokens(
    model: GptOss, tokens: Int[Tensor, "batch pos"], at: Tokens = None, n_real: Sequence[int] | None = None
) -> SelectedTokens:
    """Return the selected tokens; selecting none is an error.

    Raises:
        InputError: no token is selected.
    """
    lengths = [tokens.shape[1]] * len(tokens) if n_real is None else list(n_real)
    row = torch.cat([ids[:n] for ids, n in zip(tokens.cpu(), lengths, strict=True)])[None]
    where = PassContext(model.cfg, row, packed=lengths)
    column = where.mask(as_set(at))[0].nonzero()[:, 0]
    if not len(column):
        raise InputError(f"no token of these {len(lengths)} sequences is selected: check `at` and `n_real`")
    return SelectedTokens(row, lengths, column, where.sequence[0, column], where.positions[0, column])


def residual(model: GptOss, chosen: SelectedTokens) -> Float[Tensor, "point d_model"]:
    """Return the residual stream of the selected tokens after the last block."""
    out = model.residual(chosen.row.to(model.device), packed=chosen.lengths)
    return out[0, chosen.column.to(out.device)]


def read_out(
    model: GptOss, x: Float[Tensor, "point d_model"], column: Int[Tensor, " point"]
) -> Float[Tensor, "point d_vocab"]:
    """Return the logits of these residual streams, in at least float32; call it after `residual`."""
    assert model.context is not None, "logits come after residual"
    context, model.context = model.context, model.context.at(column[None])
    try:
        logits = model.unembed(model.ln_final(x[None].to(model.unembed.weight.device, model.dtype)))[0]
    finally:
        model.context = context
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
