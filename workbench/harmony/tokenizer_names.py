"""The names that Hugging Face's and TransformerLens' users expect of a tokenizer, for harmony's.

`encode` reads every text as ordinary characters, so that a conversation's text never becomes a mark. What is here is
for the researcher's own text: `tokenizer(text)` and `encode_with_special` read the name of a special token, as in
`<|start|>`, as that token. Nothing is added before or after a text.

Reference: transformers 5.23, tokenization_utils_base.py, for the names.
"""

import functools
import importlib
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError


class TokenizerNames:
    """Special tokens by role, calling, and conversions under Hugging Face's names."""

    name: str
    d_vocab: int
    special: dict[str, int]
    padding_side: Literal["left", "right"] = "right"
    add_bos_token = False  # harmony puts nothing before a conversation

    bos_token = property(
        lambda self: self._special_name("<|startoftext|>"), doc="In the vocabulary, unused by harmony."
    )
    eos_token = property(lambda self: self._special_name("<|return|>"), doc="It ends the final answer.")
    pad_token = property(
        lambda self: self._special_name("<|pad|>") or self._special_name("<|endoftext|>"),
        doc="It fills rows of unequal length.",
    )
    bos_token_id = property(lambda self: self.special.get(self.bos_token))
    eos_token_id = property(lambda self: self.special.get(self.eos_token))
    pad_token_id = property(lambda self: self.special.get(self.pad_token))
    unk_token = property(lambda self: None, doc="There is none: what the vocabulary lacks is an error.")
    unk_token_id = property(lambda self: None)
    vocab_size = property(lambda self: self.d_vocab, doc="Number of ids, special tokens included.")
    name_or_path = property(lambda self: self.name)
    all_special_tokens = property(lambda self: list(self.special))
    all_special_ids = property(lambda self: list(self.special.values()))
    additional_special_tokens = property(lambda self: list(self.special))

    def encode(self, text: str, *, add_special_tokens: bool = False, return_tensors: None = None) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        raise NotImplementedError

    def token(self, id: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.d_vocab

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "apply_chat_template":
            raise AttributeError(
                "the tokenizer has no apply_chat_template: workbench.harmony.render(messages, tokenizer=tokenizer) "
                "returns the ids of a conversation"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        add_special_tokens: bool = False,
    ) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` of a text or of a list of texts.

        padding: fill rows of unequal length with `pad_token_id` on `padding_side`. truncation: cut rows that are longer
        than `max_length`. return_tensors: "pt" for torch tensors, "np" for arrays, both [batch, pos].
        add_special_tokens changes nothing: harmony adds none.

        Raises:
            InputError: the vocabulary cannot express a text, or rows of unequal length are not padded.
        """
        if truncation != (max_length is not None):
            raise InputError("truncation needs both truncation=True and max_length")
        one = isinstance(text, str)
        rows = [self.encode_with_special(t)[:max_length] for t in ([text] if isinstance(text, str) else text)]
        width = max((len(row) for row in rows), default=0)
        if return_tensors is not None and not padding and any(len(row) < width for row in rows):
            raise InputError(
                f"the texts have {min(map(len, rows))} to {width} tokens and fit no tensor: pass padding=True"
            )
        masks = [[1] * len(row) for row in rows]
        if padding:
            rows, masks = self._filled(rows, width, self.pad_token_id), self._filled(masks, width, 0)
        if return_tensors is None:
            return {"input_ids": rows[0] if one else rows, "attention_mask": masks[0] if one else masks}
        return {
            name: _tensor(value, return_tensors) for name, value in (("input_ids", rows), ("attention_mask", masks))
        }

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of a text, in which the name of a special token, as in `<|start|>`, stands for that token.

        Raises:
            InputError: the vocabulary cannot express a text.
        """
        if not isinstance(text, str):
            raise InputError(f"a text was expected, got {type(text).__name__}: {text!r:.60}")
        ids: list[int] = []
        for index, part in enumerate(self._special_names.split(text)):
            if index % 2:
                ids.append(self.special[part])
            elif part:
                ids += self.encode(part)
        return ids

    def tokenize(self, text: str) -> list[str]:
        """Return the text of each token of a text."""
        return [self.token(id) for id in self.encode_with_special(text)]

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """Return the text of every row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the text of an id, or the texts of a list of ids."""
        return self.token(int(ids)) if isinstance(ids, int) else [self.token(int(id)) for id in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token's text, or the ids of a list of them.

        Raises:
            InputError: a text is not one token.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        ids = self.encode_with_special(tokens)
        if len(ids) != 1:
            raise InputError(f"{tokens!r} is {len(ids)} tokens, expected one: {[self.token(id) for id in ids]}")
        return ids[0]

    def get_vocab(self) -> dict[str, int]:
        """Return every token's text with its id; of several ids with one text the first."""
        vocabulary: dict[str, int] = {}
        for id in range(self.d_vocab):
            vocabulary.setdefault(self.token(id), id)
        return vocabulary

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)()")

    def _special_name(self, name: str) -> str | None:
        return name if name in self.special else None

    def _filled(self, rows: list[list[int]], width: int, value: int | None) -> list[list[int]]:
        if value is None:
            raise InputError(
                f"the vocabulary of {self.name} has no <|endoftext|> to pad rows with: pass the texts one by one"
            )
        left = padding_side(self.padding_side) == "left"
        return [[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows]


def padding_side(side: str) -> Literal["left", "right"]:
    """Return the side.

    Raises:
        InputError: it is neither "left" nor "right".
    """
    if side not in ("left", "right"):
        raise InputError(f"padding_side {side!r} is unknown: use 'left' or 'right'")
    return "left" if side == "left" else "right"


def plain_ids(ids: Any) -> list[int]:
    """Return ids from a number, list, array or tensor.

    Raises:
        InputError: something is not a whole number from 0.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    row = [values] if isinstance(values, int) else list(values)
    try:
        numbers = [operator.index(id) for id in row]
    except TypeError:
        numbers = [-1]
    if numbers and min(numbers) < 0:
        wrong = next(id for id in row if not hasattr(id, "__index__") or id < 0)
        raise InputError(f"{wrong!r:.60} is not a token id: expected a whole number from 0")
    return numbers


def _tensor(rows: list[list[int]], kind: str) -> Any:
    if kind == "pt":
        return importlib.import_module("torch").tensor(rows)  # named like this: this package never needs torch itself
    if kind == "np":
        return np.array(rows)
    raise InputError(f"return_tensors {kind!r} is unknown: use 'pt' or 'np'")
