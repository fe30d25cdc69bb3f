"""The grammar of one message: from a message to ids, and from labelled ids to messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.labels import Labels, label
from workbench.harmony.messages import CONSTRAIN, check_messages
from workbench.harmony.preamble import instructions_of
from workbench.harmony.vocabulary import Tokenizer, tokenizer


def parse(ids: Sequence[int], *, tokenizer: Tokenizer, n_prompt: int | None = None) -> list[dict[str, Any]]:
    """Return messages of a stream of ids, the inverse of `render`.

    The system message's text is its content; of a developer message the content is the instructions. A message that
    does not follow the format has its text with marks under `raw`.
    """
    return messages_of(ids, label(ids, tokenizer=tokenizer, n_prompt=n_prompt), tokenizer)


def parse_text(text: str) -> list[dict[str, Any]]:
    """Return messages of a text with marks, each with its text under `raw`, so that it is rendered exactly as it is."""
    vocabulary = tokenizer()
    ids = marked_ids(text, vocabulary)
    labels = label(ids, tokenizer=vocabulary)
    messages = messages_of(ids, labels, vocabulary)
    if labels.messages and labels.messages[-1].content < 0:  # the `<|start|>assistant` that a generation starts from
        labels.messages.pop()
        messages.pop()
    texts = [vocabulary.decode(ids[m.start : m.end]) for m in labels.messages]
    return [message | {"raw": raw} for message, raw in zip(messages, texts, strict=True)]


def messages_of(ids: Sequence[int], labels: Labels, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return messages of a labelled stream."""
    messages, special = [], set(tokenizer.special.values())
    for m in labels.messages:
        end = m.end if m.stop < 0 else m.stop
        content = tokenizer.decode(list(ids[m.content : end])) if m.content >= 0 else ""
        fields = {"role": m.role or "assistant", "name": m.author, "channel": m.channel, "recipient": m.recipient}
        fields["content_type"] = m.content_type.removeprefix(CONSTRAIN)
        message = {name: value for name, value in fields.items() if value} | {"content": content}
        if m.role == "developer":
            message["content"] = instructions_of(content)
        text = tokenizer.decode(list(ids[m.start : m.end]))
        marks = any(id in special for id in ids[m.content : end]) if m.content >= 0 else False
        no_channel = m.role == "assistant" and not m.channel  # it would be rendered as an answer on the final channel
        regular = not (marks or no_channel) and _is_regular(message, m.closed_by, text, tokenizer)
        if m.role not in ("system", "developer") and not regular:
            message["raw"] = text
        messages.append(message)
    return messages


def _is_regular(message: Mapping[str, Any], closed_by: str, text: str, tokenizer: Tokenizer) -> bool:
    """Return whether rendering a message gives its text again, the stop token at the end of the stream aside."""
    try:
        check_messages([{"role": "user", "content": ""}, message])
        written = tokenizer.decode(message_ids(message, tokenizer))
    except InputError:
        return False
    if closed_by in ("return", "truncated"):
        text = text.removesuffix("<|return|>")
        return any(written == text + end for end in ("<|end|>", "<|call|>"))
    return written == text


def marked_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return ids of a text in which marks are marks: a model wrote it, not a user."""
    marks = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    begin = "<|start|>assistant"  # ids of their own, as in the prompt that a generation starts from
    ids = generation_prompt_ids(tokenizer) if text.startswith(begin) else []
    for i, piece in enumerate(re.split(f"({marks})", text.removeprefix(begin))):
        ids += [tokenizer.special[piece]] if i % 2 else tokenizer.encode(piece)
    return ids


def generation_prompt_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a generation starts from: `<|start|>assistant`."""
    return [tokenizer.mark("start"), *tokenizer.encode("assistant")]


def message_ids(message: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of one message.

    `<|start|>role[:name][<|channel|>channel][ to=recipient][ <|constrain|>type]<|message|>content<|end|>`; the
    recipient comes before the channel unless that is the commentary channel of an assistant.
    """
    if (raw := message.get("raw")) is not None:
        return marked_ids(raw, tokenizer)
    role, name, recipient = message["role"], message.get("name"), message.get("recipient")
    channel = message.get("channel")
    encode, mark = tokenizer.encode, tokenizer.mark
    ids = [mark("start"), *encode(message["name"] if role == "tool" else role)]
    if name is not None and role != "tool":
        ids += encode(f":{name}")
    addressed = [] if recipient in (None, "all") else encode(f" to={recipient}")
    channel_first = role == "assistant" and channel == "commentary"
    ids += [] if channel_first else addressed
    if channel is not None:
        ids += [mark("channel"), *encode(channel)]
    ids += addressed if channel_first else []
    if (content_type := message.get("content_type")) is not None:
        ids += [*encode(" "), mark("constrain"), *encode(content_type.removeprefix(CONSTRAIN))]
    call = role == "assistant" and recipient not in (None, "all")
    return [*ids, mark("message"), *encode(message["content"]), mark("call" if call else "end")]
