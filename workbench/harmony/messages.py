"""Messages in harmony's own form, the reasoning effort, and how a value is quoted in an error.

A message is a mapping: role and content; a channel, as an assistant's message should have; a recipient, which makes
it a tool call; a content_type, such as json; a name, which a tool must have; and raw, its text with marks exactly as a
model wrote it, which is then rendered instead of the other fields.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.labels import ROLES

EFFORTS = ("low", "medium", "high")
HEADER_FIELDS = ("name", "recipient", "channel", "content_type")
FIELDS = ("role", "content", *HEADER_FIELDS, "raw")
CONSTRAIN = "<|constrain|>"


def shown(value: Any) -> str:
    """Return a value in a one-line message: short, and without control characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def effort_of(value: Any) -> str:
    """Return the effort that a value names, in any case, such as "High" of the harmony library's `ReasoningEffort`.

    Raises:
        InputError: the value names no effort.
    """
    name = getattr(value, "value", value)
    effort = name.strip().lower() if isinstance(name, str) else name
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise InputError(f"unknown effort {shown(value)}: choose from {', '.join(EFFORTS)}")
    return effort


def effort_in_text(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the effort that a system or developer message asks for in a line of its own, as in `Reasoning: high`.

    Raises:
        InputError: the text asks for several efforts.
    """
    asked: set[str] = set()
    for message in messages:
        content = message.get("content")
        if message.get("role") in ("system", "developer") and isinstance(content, str):
            for line in content.splitlines():
                name, colon, value = line.strip().lower().partition(":")
                if colon and name in ("reasoning", "reasoning effort", "reasoning_effort") and value.strip() in EFFORTS:
                    asked.add(value.strip())
    if len(asked) > 1:
        raise InputError(f"the system text asks for the efforts {' and '.join(sorted(asked))}: keep one of them")
    return asked.pop() if asked else None


def settled_effort(effort: Any, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the effort that is given, or else the one in the system text.

    Raises:
        InputError: the effort that is given contradicts the one in the system text.
    """
    asked = effort_in_text(messages)
    if effort is None or effort == "":
        return asked
    given = effort_of(effort)
    if asked is not None and asked != given:
        raise InputError(
            f"the effort is {given}, but the system text has a line that asks for {asked}: remove the line, or give "
            f"{asked}"
        )
    return given


def leading(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return how many system and developer messages come before any other."""
    return next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))


def check_messages(messages: Any) -> None:
    """Check that messages can be rendered as they are.

    Raises:
        InputError: the messages are not a list of messages, or one has a field that would not be rendered.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InputError(f"messages: got {shown(messages)}; expected a list of at least one message")
    for i, message in enumerate(messages, 1):
        _check_message(f"message {i}", message)
    for i, message in enumerate(messages[: leading(messages)], 1):
        extra = [field for field in HEADER_FIELDS if message.get(field) is not None]
        if extra and message.get("raw") is None:
            raise InputError(
                f"message {i}: a leading {message['role']} message has no {extra[0]}; give role and content"
            )


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: got {shown(message)}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(
            f"{where}: unknown role {shown(role)}; choose from {', '.join(ROLES)}, a tool's own name is its name"
        )
    if not isinstance(content, str):
        raise InputError(f"{where}: its content is {shown(content)}; expected text")
    if unknown := [field for field in message if field not in FIELDS]:
        raise InputError(f"{where}: unknown field {shown(unknown[0])}; a message has {', '.join(FIELDS)}")
    if (raw := message.get("raw")) is not None:
        if not isinstance(raw, str) or not raw:
            raise InputError(f"{where}: raw is {shown(raw)}; expected the message's text with marks")
        return
    for field in HEADER_FIELDS:
        word = message.get(field)
        if field == "content_type" and isinstance(word, str):
            word = word.removeprefix(CONSTRAIN)
        if word is not None and not (isinstance(word, str) and _is_word(word)):
            raise InputError(f"{where}: {field} is {shown(word)}; expected one word without < | > and spaces")
    name = message.get("name")
    if role == "tool" and (name is None or name.split(":")[0] in ROLES):
        raise InputError(
            f"{where}: a tool's message needs the tool's name, such as functions.search; got {shown(name)}"
        )


def _is_word(text: str) -> bool:
    return bool(text) and not text.startswith("to=") and not any(c.isspace() or c in "<|>" for c in text)
