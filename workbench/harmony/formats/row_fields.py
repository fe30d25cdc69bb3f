"""The fields that rows of any format may have beside their conversation: ids, effort, options, system text, the rest.

What nothing reads is kept in the metadata, so that no field is lost; what is too large for that is noted.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.bounded_json import parse_json, unique_names
from workbench.errors import InputError
from workbench.harmony.completion import is_complete
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.harmony.marked_text import read_output
from workbench.harmony.messages import EFFORTS, effort_of, shown
from workbench.harmony.reasoning import REASONING_FIELDS, reasoning_beside, reasoning_text

Row = Mapping[str, Any]
_RENDERING = ("builtin_tools", "model_identity", "knowledge_cutoff", "date")
_REASONING_OF_ROWS = [name for name in REASONING_FIELDS if name != "analysis"]  # which may be somebody else's
_AS_TEXT = ("messages", "conversations", "conversation", "request", "response")
_OTHER_NAMES = ("conversation", "dialog", "dialogue", "chat", "turns")
_MAX_META_CHARACTERS = 10_000  # of a field that nothing reads
IMAGES = {"image", "images", "image_url", "video", "videos", "audio", "audios"}
# what `about` and `with_system` read
_READ = {
    *("id", "custom_id", "request_id", "prompt_id", "effort", "reasoning_effort", "think", "chat_template_kwargs"),
    *("extra_body", "tools", "functions", "complete", "truncated", "system", "system_prompt", "metadata"),
    *_RENDERING,
}
_TYPES = {"correct": bool, "target": str, "meta": dict, "notes": list}  # of fields that are read if they have it


def about(row: Row, *read: str) -> dict[str, Any]:
    """Return the fields that rows of any format may have beside the conversation. read: names of the format's own.

    Raises:
        InputError: the row names two different efforts, or a value has a type that it cannot have.
    """
    id = _first_of(row, "id", "custom_id", "request_id")
    template = _template_fields(row)
    options = {name: row.get(name, template.get(name)) for name in _RENDERING}
    tools, functions = row.get("tools"), row.get("functions")
    options["tools"] = (
        [*tools, *functions] if isinstance(tools, list) and isinstance(functions, list) else tools or functions
    )
    return {
        "id": id,
        "prompt_id": _first_of(row, "prompt_id") or id,
        "effort": one_effort(row),
        "options": {name: value for name, value in options.items() if value is not None},
        "complete": is_complete(row),
        "correct": row.get("correct") if isinstance(row.get("correct"), bool) else None,
        "answer": row.get("target") if isinstance(row.get("target"), str) else None,
        "meta": {**_metadata_of(row, read), **object_of(row.get("metadata")), **object_of(row.get("meta"))},
        "notes": _notes(row, read),
    }


def _first_of(row: Row, *names: str) -> str:
    """Return the first of these fields that is there, as text; "" if none is."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def _template_fields(row: Row) -> Row:
    return object_of(row.get("chat_template_kwargs")) or object_of(
        object_of(row.get("extra_body")).get("chat_template_kwargs")
    )


def one_effort(*rows: Row) -> Any:
    """Return the effort that rows name in any of its places; None if they name none.

    Raises:
        InputError: they name two different ones.
    """
    efforts: list[Any] = []
    for row in rows:
        places = (
            row.get("effort"),
            row.get("reasoning_effort"),
            object_of(row.get("reasoning")).get("effort"),
            _template_fields(row).get("reasoning_effort"),
            _effort_only(row.get("think")),
        )
        efforts += [value for value in places if value not in (None, "")]
    if len(efforts) > 1 and len({effort_of(value) for value in efforts}) > 1:
        raise InputError(
            f"it names the efforts {' and '.join(sorted({effort_of(e) for e in efforts}))}: keep one of them"
        )
    return efforts[0] if efforts else None


def _unread(row: Row, read: Sequence[str]) -> dict[str, Any]:
    """Return the fields that nothing reads, or that have a type in which they cannot be read."""
    known = {*_READ, *IMAGES, *read}
    return {
        name: value
        for name, value in row.items()
        if value not in (None, "", [], {}) and name not in known and not isinstance(value, _TYPES.get(name, _Nothing))
    }


class _Nothing:
    """A type that no value has."""


def _metadata_of(row: Row, read: Sequence[str]) -> dict[str, Any]:
    """Return the fields that nothing reads and that metadata can hold."""
    return storable(_unread(row, read))[0]


def storable(fields: Row) -> tuple[dict[str, Any], bool]:
    """Return the fields that metadata can hold, as JSON has them, and whether these are all."""
    texts = {name: _as_json(value) for name, value in fields.items()}
    stored = {name: parse_json(text) for name, text in texts.items() if text is not None}
    return stored, len(stored) == len(fields)


def _as_json(value: Any) -> str | None:
    """Return a value as JSON, dates and the like as text; None if it is no value of metadata."""
    if isinstance(value, bytes):
        return None
    try:
        text = json.dumps(value, default=lambda part: None if isinstance(part, bytes) else str(part))
    except (TypeError, ValueError):
        return None
    return text if len(text) <= _MAX_META_CHARACTERS else None


def _notes(row: Row, read: Sequence[str]) -> list[str]:
    """Return flags of a row: those that a transcript has from an earlier reading, and what is left out now."""
    own = (
        [note for note in row.get("notes") or [] if note in SEQUENCE_FLAGS]
        if isinstance(row.get("notes"), list)
        else []
    )
    own += ["images_left_out"] if any(row.get(name) not in (None, "", [], {}) for name in IMAGES) else []
    return [*own, *([] if storable(_unread(row, read))[1] else ["fields_left_out"])]


def object_of(value: Any) -> Mapping[str, Any]:
    """Return a value that is an object, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def _effort_only(value: Any) -> Any:
    return value if isinstance(value, str) and value.strip().lower() in EFFORTS else None


def with_system(row: Row, messages: Sequence[Any]) -> list[Any]:
    """Return messages after the system text that a row keeps beside them.

    Raises:
        InputError: the messages begin with another one.
    """
    for name in ("system", "system_prompt"):
        text = row.get(name)
        if text in (None, "", []):
            continue
        if not isinstance(text, str | list):
            raise InputError(f"{name} is {shown(text)}; expected text")
        first = object_of(messages[0]) if messages else {}
        if first.get("role", first.get("from")) != "system":
            messages = [{"role": "system", "content": text}, *messages]
        elif first.get("content", first.get("value")) != text:
            raise InputError(f"{name} and its first message are two different system texts: keep one of them")
    return list(messages)


def with_reasoning(row: Row, messages: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Return messages with the reasoning that a row keeps beside them in the last answer, and the fields it was in.

    An answer that has reasoning of its own stays as it is, and the row's stays in its metadata: it is another one.
    """
    fields = [name for name in _REASONING_OF_ROWS if reasoning_text(row.get(name))[0].strip()]
    last = object_of(messages[-1]) if messages else {}
    content = last.get("content", last.get("value"))
    if not fields or last.get("role", last.get("from")) not in ("assistant", "gpt") or not isinstance(content, str):
        return list(messages), []
    if reasoning_beside(last)[0] or [m["content"] for m in read_output(content).messages] != [content]:
        return list(messages), []
    return [*messages[:-1], {**last, **{name: row[name] for name in fields}}], fields


def decoded(row: Any) -> Any:
    """Return a row with the conversation, request or response that a table keeps as a text of JSON, as JSON.

    A conversation under another name than `messages` gets this one. A text that is not JSON stays as it is.
    """
    if not isinstance(row, Mapping):
        return row
    texts = {name: row[name] for name in _AS_TEXT if isinstance(row.get(name), str) and row[name].lstrip()[:1] in "[{"}
    read = {name: value for name, text in texts.items() if (value := _of_json(text)) is not None}
    if "response" in read and not {"choices", "output", "message", "body"} & {*object_of(read["response"])}:
        del read["response"]  # an answer that is an object of JSON
    row = {**row, **read} if read else row
    other = next((name for name in _OTHER_NAMES if _is_conversation(row.get(name))), None)
    if other is not None and not any(row.get(name) for name in ("messages", "conversations", "response", "choices")):
        row = {("messages" if name == other else name): value for name, value in row.items() if name != "messages"}
    return row


def _of_json(text: str) -> Any:
    try:
        return parse_json(text, object_pairs_hook=unique_names)
    except InputError:
        return None


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value)
    )
