"""Text to ids and back, as methods of the model under TransformerLens' names.

Harmony, the format of gpt-oss, has no token that begins a text: `prepend_bos` adds nothing unless it is True. The
names of special tokens, as in `<|start|>`, are read as those tokens here; `workbench.harmony.render` makes a prompt of
messages whose text stays text.

Reference: TransformerLens 4.3, model_bridge/transformer_bridge.py, for names and return types.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.model.inputs import check_ids, encode, need_tokenizer, pad, read_batch

Text = str | Sequence[str]


class TextMethods:
    """`to_tokens`, `to_string`, `to_str_tokens`, `to_single_token`, `get_token_position` and their like."""

    tokenizer: Any
    cfg: Any
    device: Any
    unembed: Any
    ln_final: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Literal["left", "right"] = "right") -> None:
        """Use this tokenizer, an object as `workbench.harmony.tokenizer` returns."""
        self.tokenizer = tokenizer
        tokenizer.padding_side = default_padding_side

    def to_tokens(
        self,
        input: Text,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Return the ids of a text, or of a list of texts in one tensor on the model's device.

        prepend_bos: True puts `<|startoftext|>` before each text; harmony has no such token, so None adds nothing.
        padding_side: where shorter rows get `tokenizer.pad_token_id`, by default `tokenizer.padding_side`; tell the
        model with `padding_side` or `attention_mask`, or pass it the texts themselves. truncate: cut rows that are
        longer than the context `cfg.n_ctx`.

        Raises:
            InputError: the vocabulary cannot express a text, or a text has no token.
        """
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, Sequence) or not texts:
            raise InputError(f"a text or a list of texts was expected, got {type(input).__name__}: {input!r:.60}")
        rows = [encode(self, text, prepend_bos) for text in texts]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        tokens, _, _ = pad(self, rows, padding_side)
        return tokens.to(self.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of a row of ids, or a list of texts of rows of ids."""
        ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if not isinstance(ids, int) and len(ids) and not isinstance(ids[0], int) and hasattr(ids[0], "__len__"):
            return [str(self.to_string(row)) for row in ids]
        return str(need_tokenizer(self).decode(ids))

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list[str] | list[list[str]]:
        """Return the text of each token of a text or of ids; of a list of texts, or of several rows, a list for each.

        Padding that `read_batch` would add is left out.

        Raises:
            InputError: the input is neither text nor ids of the vocabulary.
        """
        if isinstance(input, int | np.integer) or (isinstance(input, Tensor) and input.dim() == 0):
            input = [int(input)]  # one id
        many = isinstance(input, Sequence) and not isinstance(input, str) and len(input) > 0
        many = many and not isinstance(input[0], int | np.integer)
        batch = read_batch(self, input, prepend_bos=prepend_bos, padding_side=padding_side)
        texts = [[self.to_single_str_token(id) for id in row] for row in batch.rows()]
        return texts if many or len(texts) > 1 else texts[0]

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            InputError: it is not one token.
        """
        return int(need_tokenizer(self).convert_tokens_to_ids(string))

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of an id.

        Raises:
            InputError: the id is not in the vocabulary.
        """
        return str(need_tokenizer(self).token(int(check_ids(torch.as_tensor(int_token), self))))

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> int:
        """Return the position of a token in a text or in one row of ids, counted from 0.

        Raises:
            InputError: the token is not there, or `input` has several rows.
        """
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        rows = read_batch(self, input, prepend_bos=prepend_bos, padding_side=padding_side).tokens.tolist()
        if len(rows) != 1:
            raise InputError(f"expected one row in which to look for the token, got {len(rows)} rows: pass one of them")
        if mode not in ("first", "last"):
            raise InputError(f"mode {mode!r} is unknown: use 'first' or 'last'")
        if token not in rows[0]:
            raise InputError(
                f"token {self.to_single_str_token(token)!r} ({token}) is not among {self.to_str_tokens(rows[0])}"
            )
        return rows[0].index(token) if mode == "first" else len(rows[0]) - 1 - rows[0][::-1].index(token)

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*any d_model"]:
        """Return the directions whose dot products with the normalised residual stream are these tokens' logits.

        tokens: an id, the text of one token, a list of either, or ids of any shape. The weight of the final norm is
        in the directions.

        Raises:
            InputError: a text is not one token, or an id is outside the vocabulary.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str):
            tokens = [self.to_single_token(token) for token in tokens]
        ids = check_ids(torch.as_tensor(tokens), self)
        directions = self.unembed.W_U.mT  # with the update of an adapter
        return directions[ids.to(directions.device)] * self.ln_final.weight
