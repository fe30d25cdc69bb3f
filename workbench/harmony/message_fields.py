"""Fields of the messages of chat APIs: which are read, which are about a message, and which would be left out."""

from collections.abc import Mapping
from typing import Any

from workbench.harmony.messages import shown
from workbench.harmony.reasoning import REASONING_FIELDS

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
        if (name in unused or name not in _USED | _ABOUT) and value not in (None, "", [], {})
    ]
