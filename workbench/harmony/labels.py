"""Labels of every token of a harmony stream: the message it belongs to, and the part of that message.

The labeller is a state machine over ids, not text: a user may write the characters `<|end|>`, which are ordinary
tokens. It works per special token and per header and fills in the rest with numpy. It accepts any ids: messages that
do not follow the format, as models sometimes write them, get flags. Prompt and generation are one stream, because the
`<|start|>assistant` at the end of the prompt belongs to the first generated message.

Output that does not follow the format stays the assistant's: text without a header, a header without `<|start|>` or
`<|message|>`, and roles that no conversation has (`assistantassistant`, `final`) give assistant messages with flags.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, UInt8

from workbench.harmony.vocabulary import Tokenizer

PARTS = (
    "outside",
    "start",
    "role",
    "channel_mark",
    "channel",
    "constrain_mark",
    "constrain",
    "message_mark",
    "content",
    "stop",
)
ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("frame", "prompt", "analysis", "commentary", "final", "other")
FRAME = CHANNELS.index("frame")  # the code of tokens that are no content of a message

FLAGS = {
    "unclosed": "another message starts before the stop token",
    "special_in_content": "a special token inside the content",
    "special_in_header": "a special token that no header has",
    "second_channel": "a second channel mark; the first one counts",
    "second_constrain": "a second constrain mark; the first one counts",
    "empty_channel": "a channel mark without a channel",
    "unknown_channel": "a channel that is none of analysis, commentary and final",
    "extra_words": "more words than a header has",
    "no_role": "no role after the start mark",
    "irregular_role": "a role that a message at this point cannot have",
    "no_start": "no start mark",
    "no_message": "no message mark between header and content",
}

_OUTSIDE, _START, _ROLE, _CHANNEL_MARK, _CHANNEL, _CONSTRAIN_MARK, _CONSTRAIN, _MESSAGE_MARK, _CONTENT, _STOP = range(
    len(PARTS)
)
_NEEDS_CONTENT = ("irregular_role", "unknown_channel", "extra_words")  # a cut word shows nothing
_SPECIAL, _TEXT_END = 100, 101  # kinds of special tokens beside those that are parts
_CLOSED_BY = {"<|end|>": "end", "<|return|>": "return", "<|call|>": "call"}
_CONTENT_TYPES = ("json", "code", "text", "python")  # words that may stand unmarked in a header without a recipient
_CONTENT_TYPE = re.compile(r"[A-Za-z][\w./+-]*")


@dataclass(slots=True)
class Message:
    """One message of a stream; fields that its header lacks are "".

    author: the name after the role, or the name of a tool. content: position of the first content token (`end` or
    `stop` if there is none), or −1 if the message has no content; channel, recipient and content type are read only
    where there is one. stop: position of the stop token, or −1. end: one past the last token. closed_by: end, return,
    call, start (another message began), eot (the text ended or began anew) or truncated. flags: see FLAGS.
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

    @property
    def text_span(self) -> slice:
        """Return the positions of the content's tokens, as in `ids[message.text_span]`; empty without content."""
        if self.content < 0:
            return slice(0, 0)
        return slice(self.content, self.end if self.stop < 0 else self.stop)


@dataclass(frozen=True)
class Labels:
    """Of every token the index of its message (−1: outside any) and its part, an index of PARTS."""

    message: Int32[np.ndarray, " tokens"]
    part: UInt8[np.ndarray, " tokens"]
    messages: list[Message]


def label(
    ids: Sequence[int] | Int[np.ndarray, " tokens"], *, tokenizer: Tokenizer, n_prompt: int | None = None
) -> Labels:
    """Label a stream of ids. The labels of a prefix are the prefix of the labels, an open header aside.

    n_prompt: how many of the ids are the prompt, if that is known. A message after it is the assistant's whatever its
    role, unless it answers a tool call or follows the end of a generation.
    """
    return _labeller(tokenizer).label(np.asarray(ids, dtype=np.int64), n_prompt)


def irregular(message: Message) -> bool:
    """Return whether a message does not follow the format; a header that was merely cut off does."""
    cut = message.closed_by == "truncated" and message.content < 0
    return any(flag != "no_message" or not cut for flag in message.flags)


def channel_codes(labels: Labels) -> UInt8[np.ndarray, " tokens"]:
    """Return the study channel of every token, an index of CHANNELS.

    The content of assistant messages by channel (unknown or missing: other), the content of all others: prompt;
    every token of the format itself: frame.
    """
    codes = [
        CHANNELS.index("prompt" if m.role != "assistant" else m.channel if m.channel in CHANNELS[2:] else "other")
        for m in labels.messages
    ]
    by_message = np.array([*codes, FRAME], dtype=np.uint8)
    return np.where(labels.part == _CONTENT, by_message[labels.message], FRAME).astype(np.uint8)


def role_codes(labels: Labels) -> Int8[np.ndarray, " tokens"]:
    """Return the role of every token's message, an index of ROLES; −1 outside, and where no role is known."""
    codes = [ROLES.index(m.role) if m.role else -1 for m in labels.messages]
    return np.array([*codes, -1], dtype=np.int8)[labels.message]


class _Runs:
    """Runs of tokens of the same part and message, in order."""

    def __init__(self) -> None:
        self._begins, self._parts, self._messages = [0], [_OUTSIDE], [-1]
        self.contents: list[tuple[int, int]] = []  # header tokens that turned out to be content

    def begin(self, at: int, part: int, message: int) -> None:
        self._begins.append(at)
        self._parts.append(part)
        self._messages.append(message)

    def labels(self, n: int, messages: list[Message]) -> Labels:
        lengths = np.diff(np.array([*self._begins, n]))
        part = np.repeat(np.array(self._parts, dtype=np.uint8), lengths)
        for start, end in self.contents:
            part[start:end] = _CONTENT
        message = np.repeat(np.array(self._messages, dtype=np.int32), lengths)
        return Labels(message=message, part=part, messages=messages)


class _Header(NamedTuple):
    role: str
    author: str
    channel: str
    recipient: str
    content_type: str
    flags: tuple[str, ...]


class _Stream:
    """The state of the labeller at a position: the messages so far, the open one, and where the last one ended."""

    def __init__(self, ids: Int[np.ndarray, " tokens"], n_prompt: int | None) -> None:
        self.ids, self.n_prompt = ids, n_prompt
        self.runs, self.messages = _Runs(), list[Message]()
        self.open: Message | None = None
        self.outside = 0  # the first token after the last message
        self.seen = False  # whether a message came since the text began: text after one is output without a header

    def begin(self, message: Message, part: int, then: int | None = None) -> None:
        """Open a message whose first token has one part and whose next ones have another."""
        self.messages.append(message)
        self.open, self.seen = message, True
        self.mark(message.start, part, then)

    def mark(self, at: int, part: int, then: int | None) -> None:
        self.runs.begin(at, part, len(self.messages) - 1)
        if then is not None:
            self.runs.begin(at + 1, then, len(self.messages) - 1)


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

    def label(self, ids: Int[np.ndarray, " tokens"], n_prompt: int | None) -> Labels:
        known = (ids >= 0) & (ids < len(self._kinds) - 1)
        kinds = self._kinds[np.where(known, ids, len(self._kinds) - 1)]
        special = np.flatnonzero(kinds)
        stream = _Stream(ids, n_prompt)
        for at, kind in zip(special.tolist(), kinds[special].tolist(), strict=True):
            self._stray_text(stream, at)
            self._special(stream, at, kind)
        self._stray_text(stream, len(ids))
        if stream.open is not None:
            self._close(stream, len(ids), "truncated")
        if n_prompt is not None:
            _roles_in_output(stream.messages, n_prompt)
        return stream.runs.labels(len(ids), stream.messages)

    def _special(self, stream: _Stream, at: int, kind: int) -> None:
        """Take one special token."""
        message = stream.open
        if kind == _START:
            if message is not None:
                message.flags += ("unclosed",)
                self._close(stream, at, "start")
            stream.begin(Message(start=at), _START, _ROLE)
        elif message is None:
            if kind in (_CHANNEL_MARK, _MESSAGE_MARK):
                stream.begin(Message(start=at, flags=("no_start",)), kind, kind + 1)
                if kind == _MESSAGE_MARK:
                    self._open_content(stream, at)
            elif kind == _TEXT_END:
                stream.outside = at + 1
                stream.seen = False
        elif kind == _TEXT_END:
            self._close(stream, at, "eot")
            stream.runs.begin(at, _OUTSIDE, -1)
            stream.seen = False
        elif kind == _STOP:
            message.stop = at
            stream.runs.begin(at, _STOP, len(stream.messages) - 1)
            self._close(stream, at + 1, self._closed_by[int(stream.ids[at])])
            stream.runs.begin(at + 1, _OUTSIDE, -1)
        elif message.content >= 0:
            if "special_in_content" not in message.flags:
                message.flags += ("special_in_content",)
        elif kind != _SPECIAL:
            stream.mark(at, kind, kind + 1)  # PARTS lists the words of a mark after the mark
            if kind == _MESSAGE_MARK:
                self._open_content(stream, at)

    def _stray_text(self, stream: _Stream, end: int) -> None:
        """Open a message at the first text outside messages, up to `end`: an answer whose header is missing."""
        start = stream.outside
        stream.outside = end + 1
        if stream.open is not None or start >= end:
            return
        if not stream.seen:
            start = end if stream.n_prompt is None else max(start, stream.n_prompt)
        for at in range(start, end):
            if self._tokenizer.decode(
                [int(stream.ids[at])] if 0 <= stream.ids[at] < self._tokenizer.d_vocab else []
            ).strip():
                stream.begin(Message(start=at, role="assistant", content=at, flags=("no_start",)), _CONTENT)
                return

    def _open_content(self, stream: _Stream, at: int) -> None:
        message = stream.messages[-1]
        message.content = at + 1
        self._read_header(message, stream.ids, at)

    def _close(self, stream: _Stream, end: int, why: str) -> None:
        message = stream.messages[-1]
        if message.content < 0:
            stop = end if message.stop < 0 else message.stop
            start = self._bare_content(stream.ids[message.start : stop], cut=why == "truncated")
            if start is not None:
                message.content = message.start + start
                stream.runs.contents.append((message.content, stop))
            self._read_header(message, stream.ids, stop if start is None else message.content)
            message.flags = (*message.flags, "no_message")
        message.end, message.closed_by = end, why
        stream.open, stream.outside = None, end

    def _bare_content(self, ids: Int[np.ndarray, " tokens"], cut: bool) -> int | None:
        """Return where content begins in a message without `<|message|>`; None if it has nothing but its header."""
        marks = np.flatnonzero(self._kinds[np.where((ids >= 0) & (ids < len(self._kinds) - 1), ids, 0)])
        after = int(marks[-1]) + 1 if len(marks) else 0
        words_of_header = _header_words(self._tokenizer.decode(ids[after:].tolist()), len(marks) <= 1, cut)
        if words_of_header is None:
            return None
        length = after
        while len(self._tokenizer.decode(ids[after:length].tolist())) < words_of_header:
            length += 1
        return length if length < len(ids) else None

    def _read_header(self, message: Message, ids: Int[np.ndarray, " tokens"], end: int) -> None:
        """Fill in the fields of the header, which ends before `end`."""
        no_start = "no_start" in message.flags
        header = self._headers(ids[message.start + (not no_start) : end].tobytes())
        message.flags = tuple(flag for flag in header.flags if not (no_start and flag == "no_role")) + message.flags
        message.role = header.role
        if message.content < 0:  # the words may go on after the cut: only a whole role is sure
            unsure = header.role == "tool" or {"no_role", "irregular_role"} & set(message.flags)
            message.role = "" if unsure else header.role
            message.flags = tuple(flag for flag in message.flags if flag not in _NEEDS_CONTENT)
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
        channel, after_channel = _channel(texts[_CHANNEL], _CHANNEL in seen, flags)
        rest += after_channel
        content_type = ""
        if _CONSTRAIN in seen:
            first, *others = texts[_CONSTRAIN].split() or [""]
            content_type = f"<|constrain|>{first}"
            rest += others
        addressed = next((word for word in rest if word.startswith("to=")), None)
        if addressed is not None:
            rest.remove(addressed)
        known = _CONTENT_TYPE.fullmatch if addressed is not None else _CONTENT_TYPES.__contains__
        if rest and not content_type and known(rest[-1]):
            content_type = rest.pop()
        if rest:
            flags.append("extra_words")
            channel = (
                " ".join([channel, *(word for word in rest if word in after_channel and not word.startswith("to="))])
                if channel
                else ""
            )
        if channel and channel not in CHANNELS[2:5]:
            flags.append("unknown_channel")
        recipient = "" if addressed is None else addressed.removeprefix("to=")
        return _Header(role, author, channel, recipient, content_type, tuple(dict.fromkeys(flags)))


def _role(words: list[str], flags: list[str]) -> tuple[str, str, list[str]]:
    """Return role, author and the words left; an author that is no role is a tool if a tool's header can begin so."""
    if not words or words[0].startswith("to="):
        flags.append("no_role")
        return "assistant", "", words
    role, _, name = words[0].partition(":")
    if role in ROLES[:-1]:
        return role, name, words[1:]
    extra = [word for word in words[1:] if not word.startswith("to=")]
    if role in CHANNELS[2:5] or role.startswith("assistant") or len(extra) > 1:
        flags.append("irregular_role")
        return "assistant", words[0], [word for word in words[1:] if word.startswith("to=")]
    return "tool", words[0], words[1:]


def _channel(text: str, marked: bool, flags: list[str]) -> tuple[str, list[str]]:
    """Return the channel and the words after it."""
    words = text.split()
    if words and not text[0].isspace() and not words[0].startswith("to="):
        return words[0], words[1:]
    if marked:
        flags.append("empty_channel")
    return "", words


def _header_words(text: str, of_role: bool, cut: bool) -> int | None:
    """Return how many characters of a text after the last mark of a header belong to it; None if all of them.

    of_role: the text follows `<|start|>`, so its first word is a role; otherwise it is a channel or a type. cut: the
    stream ends with the text, so a word or two may be the beginning of what a header has.
    """
    if of_role and text.startswith("assistant") and text[9:10] not in ("", ":") and not text[9].isspace():
        return len("assistant")
    words = text.split()
    of_header = 0 if of_role and words and words[0].partition(":")[0] not in ROLES[:-1] else 1
    while of_header < len(words) and of_header and words[of_header].startswith("to="):
        of_header += 1
    if not of_role and of_header < len(words) and words[of_header] in _CONTENT_TYPES:
        of_header += 1
    if len(words) - of_header <= (1 if cut or not of_header else 0):
        return None
    at = 0
    for word in words[:of_header]:
        at = text.index(word, at) + len(word)
    return at


def _roles_in_output(messages: Sequence[Message], n_prompt: int) -> None:
    """Give generated messages the role of the assistant, whatever their headers claim.

    A generation ends with `<|return|>` or `<|call|>`: what follows was given to the model, and so was the answer to a
    tool call that ended otherwise.
    """
    generated, before = False, Message(start=-1)
    for message in messages:
        if message.role in ("assistant", ""):
            generated = message.end > n_prompt
        elif generated and message.start >= n_prompt and message.author != (before.recipient or None):
            message.author = message.author or message.role
            message.role, message.channel = "assistant", ""
            message.flags += ("irregular_role",)
        else:
            generated = False
        generated = generated and message.closed_by not in ("return", "call")
        before = message
