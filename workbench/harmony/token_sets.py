"""Token sets: which tokens of a harmony stream are selected, by role, channel, part, message, or how many of them.

A token set is a function of a sequence's ids. It needs no tables and no run, so the same set selects what a capture
records, where an intervention acts while a model generates, and what a study counts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, PARTS, ROLES, channel_codes, label, role_codes
from workbench.harmony.vocabulary import Tokenizer

Mask = Bool[np.ndarray, " tokens"]


class TokenSet:
    """Return which of a sequence's ids are in the set, when called. `a & b`, `a | b` and `~a` are sets too."""

    def __init__(self, description: str, test: Callable[[Int[np.ndarray, " tokens"]], Mask]) -> None:
        self.description, self._test = description, test

    def __call__(self, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> Mask:
        return self._test(np.asarray(ids, dtype=np.int64))

    def __and__(self, other: "TokenSet") -> "TokenSet":
        return TokenSet(f"({self.description} and {other.description})", lambda ids: self(ids) & other(ids))

    def __or__(self, other: "TokenSet") -> "TokenSet":
        return TokenSet(f"({self.description} or {other.description})", lambda ids: self(ids) | other(ids))

    def __invert__(self) -> "TokenSet":
        return TokenSet(f"not {self.description}", lambda ids: ~self(ids))

    def __repr__(self) -> str:
        return f"<tokens: {self.description}>"


def token_set(
    *,
    tokenizer: Tokenizer,
    role: str | Iterable[str] | None = None,
    channel: str | Iterable[str] | None = None,
    part: str | Iterable[str] | None = None,
    message: int | Iterable[int] | None = None,
    position: int | Iterable[int] | slice | None = None,
    every: int = 1,
    last: int | None = None,
) -> TokenSet:
    """Return the tokens for which all that is given holds.

    channel: as studies use it, one of CHANNELS; it holds for content tokens, all others are "frame". role and part:
    of ROLES and PARTS. message, position: numbers from 0; −1 is the last. Of what is left `every` keeps the first and
    every n-th after it, then `last` the last n. What is counted from the end changes as a sequence grows.
    """
    check_token_set(role=role, channel=channel, part=part, every=every, last=last)
    wanted = [
        (role_codes, _codes("role", role, ROLES)),
        (channel_codes, _codes("channel", channel, CHANNELS)),
        (lambda labels: labels.part, _codes("part", part, PARTS)),
    ]

    def test(ids: Int[np.ndarray, " tokens"]) -> Mask:
        labels = label(ids, tokenizer=tokenizer)
        mask = np.ones(len(ids), dtype=bool)
        for read, codes in wanted:
            if codes is not None:
                mask &= np.isin(read(labels), codes)
        if message is not None:
            mask &= np.isin(labels.message, _numbers(message, len(labels.messages)))
        if position is not None:
            mask &= np.isin(np.arange(len(ids)), _numbers(position, len(ids)))
        selected = np.flatnonzero(mask)[::every]
        selected = selected if last is None else selected[-last:]
        return np.isin(np.arange(len(ids)), selected)

    given: dict[str, Any] = dict(role=role, channel=channel, part=part, message=message, position=position, last=last)
    given = {name: value for name, value in given.items() if value is not None} | (
        {"every": every} if every > 1 else {}
    )
    return TokenSet(" ".join(f"{name}={value}" for name, value in given.items()) or "all", test)


def check_token_set(*, every: int = 1, last: int | None = None, **which: Any) -> None:
    """Check the arguments of `token_set` before there is a tokenizer.

    Raises:
        InputError: `every` or `last` is below 1, or a name is unknown.
    """
    for name, known in (("role", ROLES), ("channel", CHANNELS), ("part", PARTS)):
        _codes(name, which.get(name), known)
    if every < 1 or (last is not None and last < 1):
        raise InputError(f"every={every} and last={last}: expected whole numbers from 1")


def _numbers(which: int | Iterable[int] | slice, n: int) -> list[int]:
    """Return numbers below n; negative ones count from the end, and those that are not there are left out."""
    if isinstance(which, slice):
        return list(range(n))[which]
    return [i % n for i in ([which] if isinstance(which, int) else which) if -n <= i < n]


def _codes(what: str, names: str | Iterable[str] | None, known: Sequence[str]) -> list[int] | None:
    if names is None:
        return None
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"{what} {unknown or names}: use one or several of {', '.join(known)}")
    return [known.index(name) for name in names]
