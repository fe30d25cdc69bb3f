"""Whether an answer ended by itself, from the reasons that programs state beside it or in its message."""

from collections.abc import Mapping
from typing import Any

from workbench.errors import InputError
from workbench.harmony.messages import shown

# reasons for which an answer was cut off, and those of one that ended, of many programs
_CUT = {
    "length",
    "max_tokens",
    "max_new_tokens",
    "max_output_tokens",
    "max_length",
    "model_length",
    "token_limit",
    "context_length",
    "context_length_exceeded",
    "model_context_window_exceeded",
    "incomplete",
    "content_filter",
    "safety",
    "abort",
    "aborted",
    "cancelled",
    "canceled",
    "error",
    "timeout",
    "limit",  # llama.cpp's stop_type
    "maxpredictedtokensreached",  # LM Studio's stopReason
    "contextlengthreached",
    "userstopped",
    "modelunloaded",
}
_ENDED = {
    "stop",
    "stopped",
    "complete",
    "finished",
    "end",
    "eos",
    "eos_token",
    "end_turn",
    "tool_calls",
    "tool_use",
    "function_call",
    "completed",
    "eosfound",
    "toolcalls",
}
# text in front of which an answer was cut off, though its host calls that an end
_AT_A_STOP_TEXT = {"stop_sequence", "word", "stopstringfound"}

REASONS = (
    "finish_reason",
    "stop_reason",
    "done_reason",
    "status",
    "stop_type",
    "finishReason",
    "stopReason",
    "native_finish_reason",
)
# objects that may hold the reasons; EvalScope's model_output holds them in its choice
OBJECTS = ("meta_info", "details", "stats", "response_metadata", "generation_info", "model_output")


def is_complete(fields: Mapping[str, Any]) -> bool | None:
    """Return whether an answer ended by itself, by the fields beside it; None where they state nothing.

    An unknown `finish_reason` is that of an answer which was cut off: only the known ones stand for a stop token. So is
    an end at a text that the request named, which vLLM gives as `stop_reason`: the model wrote no stop token there.

    Raises:
        InputError: `complete` or `truncated` is neither true nor false.
    """
    for name in ("complete", "truncated"):
        if not isinstance(value := fields.get(name), bool | None):
            raise InputError(f"{name} is {shown(value)}; expected true, false or null")
    if fields.get("complete") is not None:
        return bool(fields["complete"])
    if fields.get("truncated") or fields.get("incomplete_details") or fields.get("done") is False:
        return False
    objects = [fields, *(inner for name in OBJECTS if isinstance(inner := fields.get(name), Mapping))]
    choices = [
        inner["choices"][0] for inner in objects[1:] if isinstance(inner.get("choices"), list) and inner["choices"]
    ]
    objects += [choice for choice in choices if isinstance(choice, Mapping)]
    reasons = {name: [_reason(part.get(name)) for part in objects] for name in REASONS}
    stated = {reason for own in reasons.values() for reason in own}
    if stated & (_CUT | _AT_A_STOP_TEXT) or any(_is_at_stop_text(part) for part in objects):
        return False
    if stated & _ENDED:
        return True
    return False if any(reasons["finish_reason"]) else None


def _is_at_stop_text(fields: Mapping[str, Any]) -> bool:
    """Return whether an answer ended before a text that is no mark: vLLM's `stop_reason`, SGLang's `matched`."""
    reason = fields.get("finish_reason")
    text = reason.get("matched") if isinstance(reason, Mapping) else fields.get("stop_reason")
    is_text = isinstance(text, str) and text != "" and not text.startswith("<|")
    return is_text and _reason(reason) == "stop" and _reason(text) not in _ENDED


def _reason(value: Any) -> str:
    """Return a reason in lower case, "" if there is none: the last word of `FinishReason.LENGTH`, an object's type."""
    if isinstance(value, Mapping):  # as SGLang writes it
        value = value.get("type")
    return value.strip().lower().rpartition(".")[2] if isinstance(value, str) else "" if value is None else "unknown"
