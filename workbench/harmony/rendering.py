"""Messages to ids: what a model is shown.

The preamble (the system message with its effort, and leading system and developer messages) is the checkpoint's:
its chat template writes it, or the harmony library where there is none. Everything from the first other message on
is written here, by ids and as given: earlier analysis is kept, and no content can turn into a mark.

A message is a mapping: role and content; a channel, as an assistant's message should have; a recipient, which makes
it a tool call; a content_type, such as json; a name, which a tool must have.
Reference: https://cookbook.openai.com/articles/openai-harmony
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.labels import ROLES
from workbench.harmony.templates import TemplateError, render_template
from workbench.harmony.vocabulary import Tokenizer, harmony_encoding

EFFORTS = ("low", "medium", "high")

_HEADER_FIELDS = ("name", "recipient", "channel", "content_type")
_FIELDS = ("role", "content", *_HEADER_FIELDS)
_WORD = re.compile(r"(?!to=)[^\s<|>]+")
_CONSTRAIN = "<|constrain|>"


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    effort: str = "medium",
    tokenizer: Tokenizer,
    date: datetime.date | None = None,
    generation_prompt: bool = True,
) -> list[int]:
    """Ids of a conversation at a reasoning effort, up to `<|start|>assistant` if there is a generation to come.

    date: for templates that tell the model the date, which is otherwise today's.
    """
    pieces = _pieces(messages, effort, tokenizer, date)
    if generation_prompt:
        pieces.append(_generation_prompt(tokenizer))
    return [id for piece in pieces for id in piece]


def render_transcript(
    messages: Sequence[Mapping[str, Any]], *, effort: str, tokenizer: Tokenizer, date: datetime.date | None = None
) -> tuple[list[int], int]:
    """Ids of a finished conversation and how many of them are its prompt.

    The prompt ends with the `<|start|>assistant` of the first answer to the last user message; what tools said after
    it is part of the answer. An answer that ends on the final channel is closed by `<|return|>`, as a model closes it.
    """
    pieces = _pieces(messages, effort, tokenizer, date)
    roles = [message["role"] for message in messages]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    first = next((i for i, role in enumerate(roles) if i > asked and role == "assistant"), None)
    n_prompt = sum(map(len, pieces))
    if first is not None:
        answer = len(roles) - first
        n_prompt = sum(map(len, pieces[:-answer])) + len(_generation_prompt(tokenizer))
    if roles[-1] == "assistant" and messages[-1].get("channel") == "final" and not messages[-1].get("recipient"):
        pieces[-1][-1] = tokenizer.mark("return")
    return [id for piece in pieces for id in piece], n_prompt


def check_messages(messages: Any) -> None:
    """Refuse what cannot be rendered, or would be rendered as something else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InputError(f"messages: got {shown(messages)}; wanted a list of at least one message")
    for i, message in enumerate(messages, 1):
        _check_message(f"message {i}", message)
    for i, message in enumerate(messages[: _leading(messages)], 1):
        if extra := [field for field in _HEADER_FIELDS if message.get(field) is not None]:
            raise InputError(
                f"message {i}: a leading {message['role']} message has no {extra[0]}; give role and content"
            )


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: got {shown(message)}; wanted an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(
            f"{where}: unknown role {shown(role)}; choose from {', '.join(ROLES)}, a tool's own name is its name"
        )
    if not isinstance(content, str):
        raise InputError(f"{where}: its content is {shown(content)}; wanted text")
    if unknown := [field for field in message if field not in _FIELDS]:
        raise InputError(f"{where}: unknown field {shown(unknown[0])}; a message has {', '.join(_FIELDS)}")
    for field in _HEADER_FIELDS:
        word = message.get(field)
        if field == "content_type" and isinstance(word, str):
            word = word.removeprefix(_CONSTRAIN)
        if word is not None and not (isinstance(word, str) and _WORD.fullmatch(word)):
            raise InputError(f"{where}: {field} is {shown(word)}; wanted one word without < | > and spaces")
    name = message.get("name")
    if role == "tool" and (name is None or name.split(":")[0] in ROLES):
        raise InputError(
            f"{where}: a tool's message needs the tool's name, such as functions.search; got {shown(name)}"
        )


def _pieces(
    messages: Sequence[Mapping[str, Any]], effort: str, tokenizer: Tokenizer, date: datetime.date | None
) -> list[list[int]]:
    """The preamble's ids, then those of every message after it."""
    check_messages(messages)
    if effort not in EFFORTS:
        raise InputError(f"unknown effort {shown(effort)}: choose from {', '.join(EFFORTS)}")
    leading, others = messages[: _leading(messages)], messages[_leading(messages) :]
    if tokenizer.chat_template is None:
        preamble = _from_library(leading, effort, tokenizer, date)
    else:
        preamble = _from_template(tokenizer.chat_template, leading, effort, tokenizer, date)
    return [preamble, *(_written(message, tokenizer) for message in others)]


def _leading(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many system and developer messages come before any other."""
    return next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))


def _generation_prompt(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.mark("start"), *tokenizer.encode("assistant")]


def _written(message: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """One message by the grammar; its token order is the library's.

    `<|start|>role[:name][<|channel|>channel][ to=recipient][ <|constrain|>type]<|message|>content<|end|>`
    """
    role, name, recipient = message["role"], message.get("name"), message.get("recipient")
    encode, mark = tokenizer.encode, tokenizer.mark
    ids = [mark("start"), *encode(message["name"] if role == "tool" else role)]
    if name is not None and role != "tool":
        ids += encode(f":{name}")
    if (channel := message.get("channel")) is not None:
        ids += [mark("channel"), *encode(channel)]
    if recipient not in (None, "all"):
        ids += encode(f" to={recipient}")
    if (content_type := message.get("content_type")) is not None:
        ids += [*encode(" "), mark("constrain"), *encode(content_type.removeprefix(_CONSTRAIN))]
    call = role == "assistant" and recipient is not None
    return [*ids, mark("message"), *encode(message["content"]), mark("call" if call else "end")]


def _from_library(
    leading: Sequence[Mapping[str, Any]], effort: str, tokenizer: Tokenizer, date: datetime.date | None
) -> list[int]:
    """The preamble of the harmony library, in this tokenizer's ids; without a date it tells none."""
    from openai_harmony import DeveloperContent, Message, ReasoningEffort, Role, SystemContent

    encoding = harmony_encoding()
    system = SystemContent.new().with_reasoning_effort(ReasoningEffort(effort.capitalize()))
    if date is not None:
        system = system.with_conversation_start_date(date.isoformat())
    contents = [(Role.SYSTEM, system)]
    contents += [(Role.DEVELOPER, DeveloperContent.new().with_instructions(m["content"])) for m in leading]
    ids: list[int] = []
    for role, content in contents:
        rendered = encoding.decode(encoding.render(Message.from_role_and_content(role, content)))
        text = rendered.removeprefix(f"<|start|>{role.value}<|message|>").removesuffix("<|end|>")
        ids += _written({"role": role.value, "content": text}, tokenizer)
    return ids


def _from_template(
    template: str, leading: Sequence[Mapping[str, Any]], effort: str, tokenizer: Tokenizer, date: datetime.date | None
) -> list[int]:
    """What the chat template writes before a first user message.

    The template sees a placeholder for every content. Its text is cut at the marks it writes, and only then do the
    contents take their places: marks in them stay characters, and words join as they do in the full text.
    """
    contents = {f"CONTENT{i}PLACEHOLDER": message["content"] for i, message in enumerate(leading)}
    messages = [
        {"role": message["role"], "content": placeholder if message["content"] else ""}
        for message, placeholder in zip(leading, contents, strict=True)
    ]
    variables = {
        "messages": [*messages, {"role": "user", "content": "USERPLACEHOLDER"}],
        "reasoning_effort": effort,
        "add_generation_prompt": False,
        "tools": None,
    }
    try:
        text = render_template(template, json.dumps(variables), date or datetime.date.today())
    except TemplateError as error:
        raise InputError(f"the chat template of {tokenizer.name} failed: {error}") from error
    pieces = _before_the_user(text, tokenizer)
    for i, (placeholder, content) in enumerate(contents.items(), 1):
        if content and not any(placeholder in piece for piece in pieces):
            raise InputError(
                f"message {i}: the chat template of {tokenizer.name} leaves this {leading[i - 1]['role']} message out: "
                "join it with the one before"
            )
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            ids.append(tokenizer.special[piece])
        elif piece:
            ids += tokenizer.encode(re.sub(r"CONTENT\d+PLACEHOLDER", lambda key: contents.get(key[0], key[0]), piece))
    return ids


def _before_the_user(text: str, tokenizer: Tokenizer) -> list[str]:
    """A template's text up to its user message: what stands between marks, and every second one a mark."""
    marks = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    pieces = re.split(f"({marks})", text)
    user = next((i for i, piece in enumerate(pieces) if "USERPLACEHOLDER" in piece), 0)
    start = max((i for i, piece in enumerate(pieces[:user]) if piece == "<|start|>"), default=-1)
    if start < 0:
        raise InputError(
            f"the chat template of {tokenizer.name} writes no user message after <|start|>: is it gpt-oss's?"
        )
    return pieces[:start]


def shown(value: Any) -> str:
    """A value in a one-line message: short, and without control characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
