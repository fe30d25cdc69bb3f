"""Which tokens of a conversation a model is trained to predict."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, label
from workbench.harmony.transcripts import read_transcripts
from workbench.harmony.vocabulary import Tokenizer

ANSWERED = CHANNELS[2:]  # the channels of the assistant


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence, and which of its tokens are taught: predicted from those before them, with a loss."""

    ids: Int32[np.ndarray, " tokens"]
    taught: Bool[np.ndarray, " tokens"]


def taught_tokens(
    ids: Sequence[int] | Int32[np.ndarray, " tokens"],
    n_prompt: int,
    *,
    tokenizer: Tokenizer,
    channels: Collection[str] | None = None,
) -> Bool[np.ndarray, " tokens"]:
    """Return which tokens the model itself would write: those of assistant messages after the prompt.

    The tokens of the format belong to them, from `<|channel|>` to the token that ends a message: a model that does not
    learn them does not learn to answer. What tools return is never taught. channels: only messages in these channels.

    Raises:
        InputError: a channel is unknown.
    """
    if unknown := sorted(set(channels or ()) - set(ANSWERED)):
        raise InputError(f"channel {unknown[0]!r}: choose from {', '.join(ANSWERED)}")
    labels = label(ids, tokenizer=tokenizer, n_prompt=n_prompt)
    wanted = [
        m.role == "assistant" and (channels is None or (m.channel if m.channel in ANSWERED else "other") in channels)
        for m in labels.messages
    ]
    mask = np.array([*wanted, False])[labels.message]
    mask[:n_prompt] = False
    return mask


def read_examples(
    path: str | Path, *, tokenizer: Tokenizer, n_ctx: int, channels: Collection[str] | None = None
) -> list[Example]:
    """Return the conversations of a file of transcripts or of messages.

    Raises:
        InputError: a row cannot be used, is longer than the context, or has nothing that is taught.
    """
    transcripts, rejects = read_transcripts(path, tokenizer=tokenizer, n_ctx=n_ctx)
    if rejects:
        first = rejects[0]
        raise InputError(f"{path}, line {first.line}: {first.reason} ({len(rejects)} rows cannot be used)")
    examples = []
    for row in transcripts:
        taught = taught_tokens(row.tokens, row.n_prompt, tokenizer=tokenizer, channels=channels)
        if not taught.any():
            chosen = "" if channels is None else f" in the channels {', '.join(sorted(channels))}"
            raise InputError(f"{path}: row {row.id!r} has no token of an answer{chosen} after its prompt")
        examples.append(Example(row.tokens, taught))
    return examples
