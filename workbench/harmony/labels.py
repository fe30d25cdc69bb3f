"""What every token of a harmony stream is: which message it belongs to, and which part of it.

A state machine over ids, not text: a user may write the characters `<|end|>`, which are ordinary tokens. Its work
is per special token and per header; what lies between is filled in by numpy. It never fails: malformed streams, as
models write them, get flags. Prompt and generation are one stream, as the prompt's closing `<|start|>assistant`
belongs to the first generated message.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, UInt8

from workbench.harmony.vocabulary import Tokenizer

PARTS = (
    "outside", "start", "role", "channel_mark", "channel", "constrain_mark", "constrain", "message_mark", "content",
    "stop",
)  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("frame", "prompt", "analysis", "commentary", "final", "other")

_OUTSIDE, _START, _ROLE, _CHANNEL_MARK, _CHANNEL, _CONSTRAIN_MARK, _CONSTRAIN, _MESSAGE_MARK, _CONTENT, _STOP = range(
    len(PARTS)
)
_SPECIAL, _TEXT_END = 100, 101  # kinds of special tokens beside those that are parts
_CLOSED_BY = {"<|end|>": "end", "<|return|>": "return", "<|call|>": "call"}


@dataclass(slots=True)
class Message:
    """One message of a stream; what its header does not say, or was cut off, is "".

    author: the name after the role, or a tool's own. content: position of the first content token (`end` or `stop`
    if there is none), or −1 without a `<|message|>`; the rest of a header counts only with one. stop: position of the
    stop token, or −1. end: one past the last token. closed_by: end, return, call, start (another message began),
    eot (the text ended or began anew) or truncated. flags: what is irregular, in words.
    """

    start: int
    role: str = ""
    author: str = ""
    channel: str = ""
    recipient: str = ""
    content_type: str = ""
    content: int = -1
    stop: int = -1
    end: int = -1
    closed_by: str = "truncated"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labels:
    """Of every token the index of its message (−1: outside any) and its part, an index of PARTS."""

    message: Int32[np.ndarray, " tokens"]
    part: UInt8[np.ndarray, " tokens"]
    messages: list[Message]


def label(ids: Sequence[int] | Int[np.ndarray, " tokens"], *, tokenizer: Tokenizer) -> Labels:
    """Label a stream of ids. The labels of a prefix are the prefix of the labels, an open header's fields aside."""
    return _labeller(tokenizer).label(np.asarray(ids, dtype=np.int64))


def channel_codes(labels: Labels) -> UInt8[np.ndarray, " tokens"]:
    """The study channel of every token, an index of CHANNELS.

    The content of assistant messages by channel (unknown or missing: other), the content of all others: prompt;
    every token of the format itself: frame.
    """
    codes = [
        CHANNELS.index("prompt" if m.role != "assistant" else m.channel if m.channel in CHANNELS[2:] else "other")
        for m in labels.messages
    ]
    by_message = np.array([*codes, CHANNELS.index("frame")], dtype=np.uint8)
    return np.where(labels.part == _CONTENT, by_message[labels.message], CHANNELS.index("frame")).astype(np.uint8)


def role_codes(labels: Labels) -> Int8[np.ndarray, " tokens"]:
    """The role of every token's message, an index of ROLES; −1 outside, and where no role is known."""
    codes = [ROLES.index(m.role) if m.role else -1 for m in labels.messages]
    return np.array([*codes, -1], dtype=np.int8)[labels.message]


class _Runs:
    """Runs of tokens alike: where each begins, its part and its message."""

    def __init__(self) -> None:
        self._begins, self._parts, self._messages = [0], [_OUTSIDE], [-1]

    def begin(self, at: int, part: int, message: int) -> None:
        self._begins.append(at)
        self._parts.append(part)
        self._messages.append(message)

    def labels(self, n: int, messages: list[Message]) -> Labels:
        lengths = np.diff(np.array([*self._begins, n]))
        return Labels(
            message=np.repeat(np.array(self._messages, dtype=np.int32), lengths),
            part=np.repeat(np.array(self._parts, dtype=np.uint8), lengths),
            messages=messages,
        )


class _Header(NamedTuple):
    role: str
    author: str
    channel: str
    recipient: str
    content_type: str
    flags: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def _labeller(tokenizer: Tokenizer) -> "_Labeller":
    return _Labeller(tokenizer)


class _Labeller:
    """The state machine for one vocabulary; it remembers the headers it has read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = np.zeros(tokenizer.d_vocab + 1, dtype=np.uint8)  # the last one: ids that are in no vocabulary
        kinds[list(tokenizer.special.values())] = _SPECIAL
        text_ends = {"<|endoftext|>", "<|startoftext|>"} & tokenizer.special.keys()
        kinds[[tokenizer.special[name] for name in text_ends]] = _TEXT_END
        kinds[tokenizer.mark("start")] = _START
        kinds[tokenizer.mark("message")] = _MESSAGE_MARK
        kinds[tokenizer.mark("channel")] = _CHANNEL_MARK
        kinds[tokenizer.mark("constrain")] = _CONSTRAIN_MARK
        self._closed_by = {tokenizer.special[name]: why for name, why in _CLOSED_BY.items()}
        kinds[list(self._closed_by)] = _STOP
        self._kinds = kinds
        self._headers = functools.lru_cache(maxsize=4096)(self._header)

    def label(self, ids: Int[np.ndarray, " tokens"]) -> Labels:
        known = (ids >= 0) & (ids < len(self._kinds) - 1)
        kinds = self._kinds[np.where(known, ids, len(self._kinds) - 1)]
        special = np.flatnonzero(kinds)
        runs = _Runs()
        messages: list[Message] = []
        open_: Message | None = None
        for at, kind in zip(special.tolist(), kinds[special].tolist(), strict=True):
            if kind == _START:
                if open_ is not None:
                    open_.flags += ("unclosed",)
                    self._close(open_, ids, at, "start")
                open_ = Message(start=at)
                messages.append(open_)
                runs.begin(at, _START, len(messages) - 1)
                runs.begin(at + 1, _ROLE, len(messages) - 1)
            elif open_ is None:
                continue
            elif kind == _TEXT_END:
                self._close(open_, ids, at, "eot")
                open_ = None
                runs.begin(at, _OUTSIDE, -1)
            elif kind == _STOP:
                open_.stop = at
                self._close(open_, ids, at + 1, self._closed_by[int(ids[at])])
                open_ = None
                runs.begin(at, _STOP, len(messages) - 1)
                runs.begin(at + 1, _OUTSIDE, -1)
            elif open_.content >= 0:
                if "special_in_content" not in open_.flags:
                    open_.flags += ("special_in_content",)
            elif kind == _MESSAGE_MARK:
                open_.content = at + 1
                self._read_header(open_, ids, at)
                runs.begin(at, _MESSAGE_MARK, len(messages) - 1)
                runs.begin(at + 1, _CONTENT, len(messages) - 1)
            elif kind != _SPECIAL:
                runs.begin(at, kind, len(messages) - 1)
                runs.begin(at + 1, kind + 1, len(messages) - 1)  # PARTS has the words of a mark behind it
        if open_ is not None:
            self._close(open_, ids, len(ids), "truncated")
        return runs.labels(len(ids), messages)

    def _close(self, message: Message, ids: Int[np.ndarray, " tokens"], end: int, why: str) -> None:
        if message.content < 0:
            self._read_header(message, ids, end if message.stop < 0 else message.stop)
        message.end, message.closed_by = end, why

    def _read_header(self, message: Message, ids: Int[np.ndarray, " tokens"], end: int) -> None:
        """Fill in what stands between `<|start|>` and `end`."""
        header = self._headers(ids[message.start + 1 : end].tobytes())
        message.flags = header.flags + message.flags
        message.role = header.role
        if message.content < 0:  # the words may go on after the cut: only a whole role is sure
            message.role = header.role if header.role != "tool" else ""
            message.flags = (*message.flags, "no_message")
            return
        message.author, message.channel = header.author, header.channel
        message.recipient, message.content_type = header.recipient, header.content_type

    def _header(self, header: bytes) -> _Header:
        """role[:name][ to=recipient][<|channel|>channel[ to=recipient]][ <|constrain|>type], in any disorder."""
        sections: dict[int, list[int]] = {_ROLE: [], _CHANNEL: [], _CONSTRAIN: []}
        seen = {_ROLE}
        flags: list[str] = []
        current = sections[_ROLE]
        for id in np.frombuffer(header, dtype=np.int64).tolist():
            kind = int(self._kinds[id]) if 0 <= id < len(self._kinds) - 1 else _SPECIAL
            if kind in (_CHANNEL_MARK, _CONSTRAIN_MARK):
                if kind + 1 in seen:  # the first one counts
                    flags.append("second_channel" if kind == _CHANNEL_MARK else "second_constrain")
                    current = []
                else:
                    seen.add(kind + 1)
                    current = sections[kind + 1]
            elif kind:
                flags.append("special_in_header")
            else:
                current.append(id)
        texts = {section: self._tokenizer.decode(words) for section, words in sections.items()}
        role, author, rest = _role(texts[_ROLE].split(), flags)
        words = texts[_CHANNEL].split()
        channel = ""
        if words and not texts[_CHANNEL][0].isspace() and not words[0].startswith("to="):
            channel = words.pop(0)
        elif _CHANNEL in seen:
            flags.append("empty_channel")
        rest += words
        content_type = ""
        if _CONSTRAIN in seen:
            first, *others = texts[_CONSTRAIN].split() or [""]
            content_type = f"<|constrain|>{first}"
            rest += others
        addressed = next((word for word in rest if word.startswith("to=")), None)
        if addressed is not None:
            rest.remove(addressed)
        if rest and not content_type:
            content_type = rest.pop()
        if rest:
            flags.append("extra_words")
        recipient = "" if addressed is None else addressed.removeprefix("to=")
        return _Header(role, author, channel, recipient, content_type, tuple(dict.fromkeys(flags)))


def _role(words: list[str], flags: list[str]) -> tuple[str, str, list[str]]:
    """Role, author and the words left. An author that is no role is a tool."""
    if not words or words[0].startswith("to="):
        flags.append("no_role")
        return "", "", words
    role, _, name = words[0].partition(":")
    if role in ROLES[:-1]:
        return role, name, words[1:]
    return "tool", words[0], words[1:]
