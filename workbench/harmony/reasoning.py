"""The reasoning that a message of a chat API holds beside its content, under one of the names that hosts give it.

Hosts give the same reasoning under several names, which is one reasoning. Where two fields hold different ones, nothing
shows which of them the model wrote, so the message is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

REASONING_FIELDS = (
    "thinking",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "analysis",
    "reasoning_text",
    "thinking_blocks",
    "chain_of_thought",
    "cot",
    "thoughts",
)
# objects in which LangChain, LiteLLM and OpenAI's client keep the fields of a host that they do not know
WRAPPERS = ("additional_kwargs", "provider_specific_fields", "model_extra")


class DifferentReasoningError(ValueError):
    """A message that holds two reasonings; which, in one line."""


def reasoning_beside(message: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the reasoning in the fields of a message, "" if there is none but spaces, and whether it is a summary.

    A summary is used where the reasoning itself is not there.

    Raises:
        DifferentReasoningError: two fields hold different reasoning.
    """
    wrapped = {f"{name} of {outer}": inner[name] for outer, inner in _wrapped(message) for name in inner}
    fields = {name: message.get(name) for name in REASONING_FIELDS} | wrapped
    read = {name: reasoning_text(value) for name, value in fields.items()}
    verbatim = {name: text for name, (text, summary) in read.items() if text.strip() and not summary}
    texts = verbatim or {name: text for name, (text, _) in read.items() if text.strip()}
    if not texts:
        return "", False
    first, *others = texts
    for other in others:
        check_same(first, texts[first], other, texts[other])
    return texts[first], not verbatim


def _wrapped(message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the fields of reasoning in the objects that programs add to a message."""
    objects = [(outer, inner) for outer in WRAPPERS if isinstance(inner := message.get(outer), Mapping)]
    return [(outer, {name: inner[name] for name in REASONING_FIELDS if name in inner}) for outer, inner in objects]


def check_same(one: str, text: str, other: str, text_of_other: str) -> None:
    """Check that two texts differ in spaces and line ends alone, as one reasoning in two forms does.

    Raises:
        DifferentReasoningError: they hold different words.
    """
    if text.split() != text_of_other.split() and "".join(text.split()) != "".join(text_of_other.split()):
        raise DifferentReasoningError(f"its {one} and its {other} are not the same text: keep one of them")


def reasoning_text(value: Any) -> tuple[str, bool]:
    """Return the reasoning in a field or a part, and whether it is a summary; what is redacted is left out."""
    if isinstance(value, str):
        return value, False
    if isinstance(value, Mapping):
        kind = str(value.get("type", ""))
        hidden = value.get("redacted") or kind in ("reasoning.encrypted", "redacted_thinking")
        if not hidden:
            for name in ("text", "reasoning", "thinking", "content", "details"):
                text, summary = reasoning_text(value.get(name))
                if text:
                    return text, summary or kind in ("summary_text", "reasoning.summary")
        return reasoning_text(value.get("summary"))[0], True
    if isinstance(value, Sequence):
        parts = [reasoning_text(item) for item in value]
        return "".join(text for text, _ in parts), any(summary for text, summary in parts if text)
    return "", False
