"""Fields of the messages of chat APIs: which are read, which are about a message, and which would be left out."""

from collections.abc import Mapping
from typing import Any

from workbench.bounded_json import parse_json
from workbench.harmony.messages import shown
from workbench.harmony.reasoning import REASONING_FIELDS, WRAPPERS

_USED = {
    "role",
    "content",
    "channel",
    "recipient",
    "content_type",
    "name",
    "raw",
    "tool_calls",
    "tool_call_id",
    "function",
    "function_call",
    "tool_name",
    "refusal",
    *REASONING_FIELDS,
}
_OF_ASSISTANTS = {"tool_calls", "function_call", "refusal", *REASONING_FIELDS}
_LANGCHAIN = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant", "system": "system", "tool": "tool"}
# Fields about a message, not of it: they are not part of any prompt.
_ABOUT = {
    "id",
    "type",
    "status",
    "object",
    "created",
    "created_at",
    "timestamp",
    "model",
    "source",
    "metadata",
    "meta",
    "annotations",
    "weight",
    "finish_reason",
    "stop_reason",
    "done_reason",
    "logprobs",
    "index",
    "usage",
    "error",
    "parse_error",
    "view",
    "format",
    "phase",
    "token_ids",
    "response_metadata",
    "train",
    "function_call_id",
    "call_id",
    "images",
    "end_turn",
}


def left_out_fields(message: Mapping[str, Any], role: str) -> list[str]:
    """Return what of a message has no place in a prompt, in words: fields that nothing reads in a message of its role.

    Reasoning, calls and a refusal are an assistant's alone; a refusal is used instead of the content.
    """
    unused = set() if role == "assistant" else set(_OF_ASSISTANTS)
    unused |= {"refusal"} if message.get("refusal") and message.get("content") else set()
    unused |= {name for name in REASONING_FIELDS if isinstance(message.get(name), int | float) and message[name]}
    return [
        f"the field {shown(name)} of a message"
        for name, value in message.items()
        if (name in unused or name not in _USED | _ABOUT)
        and value not in (None, "", [], {})
        and not (name in WRAPPERS and role == "assistant" and _is_read(value, message))
    ]


def _is_read(wrapper: Any, message: Mapping[str, Any]) -> bool:
    """Return whether an object that a program adds holds reasoning and what the message itself has, no more."""
    return isinstance(wrapper, Mapping) and all(
        name in REASONING_FIELDS or name in _ABOUT or value in (None, "", [], {}) or message.get(name)
        for name, value in wrapper.items()
    )


def with_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message of ShareGPT (`from`, `value`) or LangChain (`type`, `data`) with role and content."""
    if "role" not in message and message.get("type") in _LANGCHAIN:
        fields = message["data"] if isinstance(message.get("data"), Mapping) else message
        return {**{k: v for k, v in fields.items() if k != "type"}, "role": _LANGCHAIN[message["type"]]}
    if "role" in message or "from" not in message:
        return message
    role, value = message["from"], message.get("value")
    if role == "function_call":
        call = parse_json(value) if isinstance(value, str) else value
        return {"role": "assistant", "content": None, "tool_calls": call if isinstance(call, list) else [call]}
    return {**{k: v for k, v in message.items() if k not in ("from", "value")}, "role": role, "content": value}
