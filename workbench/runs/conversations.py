"""The text of a run: its sequences as messages, with the tokenizer that its provenance names."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from workbench import harmony
from workbench.errors import InputError


@cache
def tokenizer_of(digest: str) -> harmony.Tokenizer | None:
    """Return the tokenizer with this digest: that of o200k_harmony, that of nano, or None if it is neither."""
    nano = Path(__file__).parents[1] / "data" / "nano"
    for source in (None, nano):
        known = harmony.tokenizer(source)
        if known.digest == digest:
            return known
    return None


def tokenizer(run: Any, given: harmony.Tokenizer | None = None) -> harmony.Tokenizer:
    """Return the tokenizer of a run, or the one that is given.

    Raises:
        InputError: the run's tokenizer is not installed, or the one given is another.
    """
    digest = run.provenance.get("tokenizer", {}).get("digest", "")
    if given is not None and digest and given.digest != digest:
        raise InputError(f"{run.path} was captured with another tokenizer: give model.tokenizer of its model")
    tokenizer_used = given or tokenizer_of(digest)
    if tokenizer_used is None:
        name = run.provenance.get("tokenizer", {}).get("name", "unknown")
        raise InputError(
            f"{run.path} was captured with the tokenizer {name!r}, not found here: give tokenizer=model.tokenizer"
        )
    return tokenizer_used


def text(ids: Sequence[int] | np.ndarray, tokenizer: harmony.Tokenizer) -> str:
    """Return the text of these ids [token], marks included."""
    return tokenizer.decode([int(i) for i in ids])


def conversation(run: Any, number: int, tokenizer: harmony.Tokenizer) -> list[dict[str, Any]]:
    """Return the messages of a sequence as the run's table has them, with their texts and the span of each text."""
    ids = run.sequence(number)["id"].values
    table = run.messages[run.messages["sequence"] == number]
    messages = []
    for row in table.to_dict("records"):
        first = max(int(row["content"]), 0)
        last = first if row["content"] < 0 else int(row["end"] if row["stop"] < 0 else row["stop"])
        message: dict[str, Any] = {
            str(k): v for k, v in row.items() if k not in ("sequence", "start", "content", "stop", "end")
        }
        messages.append(message | {"text": text(ids[first:last], tokenizer), "text_span": slice(first, last)})
    return messages
