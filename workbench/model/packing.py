"""Several sequences in one forward pass: which ones go together, and their tokens in one row.

`model.residual(tokens, packed=lengths)` takes the result: no token attends to another sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.harmony.transcripts import Transcript

FORWARD_TOKENS = 4096  # tokens of one packed forward pass: large enough for full expert tiles, small enough for 24 GB


class Packed(NamedTuple):
    """The tokens of several sequences in one row, and the length of each sequence."""

    tokens: Int[Tensor, "1 pos"]
    lengths: list[int]


def passes(lengths: Iterable[int], most: int = FORWARD_TOKENS) -> Iterator[list[int]]:
    """Yield the numbers of consecutive sequences that together have at most `most` tokens; a longer one is alone."""
    batch: list[int] = []
    tokens = 0
    for number, length in enumerate(lengths):
        if batch and tokens + length > most:
            yield batch
            batch, tokens = [], 0
        batch.append(number)
        tokens += length
    if batch:
        yield batch


def pack(rows: Sequence[Transcript], device: torch.device | str = "cpu") -> Packed:
    """Return the tokens of these sequences in one row on the device."""
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows])).long()
    return Packed(tokens[None].to(device), [len(row.tokens) for row in rows])
