"""Inputs of a forward pass: text, lists of text or ids in any container, as one checked tensor on the device.

This is the one place where ids are checked and moved to the model's device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony.tokenizer_names import padding_side as checked_side

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Rows of ids on the model's device. Row i has `n_left[i]` tokens of padding, then `n_real[i]` of its own."""

    tokens: Int[Tensor, "batch pos"]
    n_left: list[int]
    n_real: list[int]

    def rows(self) -> list[list[int]]:
        """Return every row's own ids, without padding."""
        counts = zip(self.tokens.tolist(), self.n_left, self.n_real, strict=True)
        return [row[left : left + n] for row, left, n in counts]

    @property
    def padded_left(self) -> bool:
        """Return whether any row has padding on its left."""
        return any(self.n_left)


def read_batch(
    model: Any,
    given: Any,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    attention_mask: Any = None,
) -> Batch:
    """Return text, a list of texts, or ids [batch pos] or [pos] in any container as a batch on the model's device.

    Text is tokenised as it is, names of special tokens included; a string of digits is text. prepend_bos: True puts
    `<|startoftext|>` before each text; harmony has none, so that False and None add nothing. Rows of unequal length
    are padded on `padding_side`, by default the tokenizer's. For a tensor, `padding_side` states that `pad_token_id` at
    that side is padding; without it every id counts. attention_mask [batch pos]: 1 for tokens, 0 for padding before
    or after them.

    Raises:
        InputError: the input is neither text nor ids of the vocabulary, or a row has no token.
    """
    if isinstance(given, Mapping) and "input_ids" in given:
        attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
        given = given["input_ids"]
    texts = _texts(given)
    if texts is not None:
        rows = [encode(model, text, prepend_bos) for text in texts]
        tokens, n_left, n_real = pad(model, rows, padding_side)
    elif _ragged(given):
        rows = [plain_row(row, model) for row in given]
        tokens, n_left, n_real = pad(model, rows, padding_side)
    else:
        tokens = check_ids(_matrix(given), model)
        n_left, n_real = [0] * len(tokens), [tokens.shape[1]] * len(tokens)
        if padding_side is not None and attention_mask is None:
            n_left, n_real = _counted(_not_padding(model, tokens, checked_side(padding_side)))
    if attention_mask is not None:
        n_left, n_real = _counted(_mask(attention_mask, tokens))
    return Batch(tokens.to(model.device), n_left, n_real)


def encode(model: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """Return a text's ids.

    Raises:
        InputError: the model has no tokenizer, or `prepend_bos` is True and the vocabulary has no such token.
    """
    tokenizer = need_tokenizer(model)
    ids: list[int] = tokenizer.encode_with_special(text)
    if not prepend_bos:
        return ids
    if tokenizer.bos_token_id is None:
        raise InputError(f"prepend_bos=True: the vocabulary of {tokenizer.name} has no <|startoftext|>; leave it out")
    return [tokenizer.bos_token_id, *ids]


def need_tokenizer(model: Any) -> Any:
    """Return the model's tokenizer.

    Raises:
        InputError: it has none.
    """
    if model.tokenizer is None:
        raise InputError(
            "this model has no tokenizer: pass ids, or set model.tokenizer = workbench.harmony.tokenizer()"
        )
    return model.tokenizer


def pad(
    model: Any, rows: Sequence[Sequence[int]], padding_side: str | None = None
) -> tuple[Int[Tensor, "batch pos"], list[int], list[int]]:
    """Return rows of ids as one tensor on the CPU, and how many tokens of padding and of its own each has.

    Raises:
        InputError: there are no rows, or a row has no token.
    """
    if not rows or not all(len(row) for row in rows):
        empty = "no rows" if not rows else f"row {next(i for i, row in enumerate(rows) if not len(row))} is empty"
        raise InputError(f"every row needs at least one token, got {empty}")
    width = max(map(len, rows))
    tokenizer = model.tokenizer
    default = "right" if tokenizer is None else tokenizer.padding_side
    left = checked_side(padding_side or default) == "left"
    filler = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = torch.full((len(rows), width), filler)
    for out, row in zip(tokens, rows, strict=True):
        out[slice(width - len(row), None) if left else slice(len(row))] = torch.tensor(row)
    return tokens, [width - len(row) if left else 0 for row in rows], [len(row) for row in rows]


def plain_row(row: Any, model: Any) -> list[int]:
    """Return one row of ids as a list.

    Raises:
        InputError: the input is anything else.
    """
    if isinstance(row, str):
        raise InputError(f"expected a list of texts or of ids, not both: got the text {row!r:.60}")
    if len(row) == 0:
        return []
    tensor = _integers(row)
    if tensor.dim() != 1:
        raise InputError(f"a row of ids has one axis, got {list(tensor.shape)}")
    return [int(id) for id in check_ids(tensor, model)]


def check_ids(tokens: Int[Tensor, "*any"], model: Any) -> Int[Tensor, "*any"]:
    """Return the ids as int64.

    Raises:
        InputError: there are none, or one is not of the vocabulary.
    """
    if not tokens.numel():
        raise InputError(f"no tokens: got ids of shape {list(tokens.shape)}, expected at least one in every row")
    least, most = (int(v) for v in torch.aminmax(tokens))
    if least < 0 or most >= model.cfg.d_vocab:
        raise InputError(
            f"token id {least if least < 0 else most} is not in the vocabulary: expected 0 to {model.cfg.d_vocab - 1}"
        )
    return tokens.long()


def _texts(given: Any) -> list[str] | None:
    """Return the texts if these are some, else None."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, np.ndarray) and given.dtype.kind in "UO":
        given = given.tolist()
    if isinstance(given, Sequence) and len(given) and isinstance(given[0], str):
        if wrong := [item for item in given if not isinstance(item, str)]:
            raise InputError(f"expected a list of texts or of ids, not both: got {wrong[0]!r:.60} among texts")
        return list(given)
    return None


def _ragged(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and not isinstance(given[0], int | np.integer)


def _matrix(given: Any) -> Int[Tensor, "batch pos"]:
    tensor = _integers(given)
    if tensor.dim() not in (1, 2):
        raise InputError(f"ids have the axes [batch, pos] or [pos], got shape {list(tensor.shape)}")
    return tensor[None] if tensor.dim() == 1 else tensor


def _integers(given: Any) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"expected text or token ids, got {type(given).__name__}: {given!r:.60}") from error
    if tensor.numel() and tensor.dtype not in _INTEGERS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"token ids are whole numbers, got {dtype} of shape {list(tensor.shape)}: convert with .long()"
        )
    return tensor.detach() if tensor.numel() else tensor.long()


def _not_padding(model: Any, tokens: Tensor, side: str) -> Tensor:
    """1 for every token but the run of `pad_token_id` at this side."""
    real = (tokens != need_tokenizer(model).pad_token_id).long()
    return real.cummax(1).values if side == "left" else real.flip(1).cummax(1).values.flip(1)


def _mask(attention_mask: Any, tokens: Tensor) -> Tensor:
    mask = torch.as_tensor(attention_mask)
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != tokens.shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}, the ids {list(tokens.shape)}: pass one per id")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask holds values other than 0 (padding) and 1 (token)")
    return mask.long()


def _counted(real: Int[Tensor, "batch pos"]) -> tuple[list[int], list[int]]:
    """Return padding on the left and tokens of every row of a mask, which must be one run."""
    n_real, first = real.sum(1), real.argmax(1)
    width = torch.arange(real.shape[1], device=real.device)
    run = (width >= first[:, None]) & (width < (first + n_real)[:, None])
    for what, wrong in (("no token", n_real == 0), ("padding between tokens", (run != real.bool()).any(1))):
        if wrong.any():
            raise InputError(
                f"row {int(wrong.long().argmax())} of the attention_mask has {what}: expected one run of 1"
            )
    return first.tolist(), n_real.tolist()
