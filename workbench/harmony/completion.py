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
}
_ENDED = {
    "stop",
    "stopped",
    "complete",
    "finished",
    "end",
    "stop_sequence",
    "eos",
    "eos_token",
    "end_turn",
    "tool_calls",
    "tool_use",
    "function_call",
    "completed",
}


REASONS = ("finish_reason", "stop_reason", "done_reason", "status")


def is_complete(fields: Mapping[str, Any]) -> bool | None:
    """Return whether an answer ended by itself, by the fields beside it; None where they state nothing.

    An unknown `finish_reason` is that of an answer which was cut off: only the known ones stand for a stop token.

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
    reasons = {name: _reason(fields.get(name)) for name in REASONS}
    if any(reason in _CUT for reason in reasons.values()):
        return False
    if any(reason in _ENDED for reason in reasons.values()):
        return True
    return False if reasons["finish_reason"] else None


def _reason(value: Any) -> str:
    """Return a reason in lower case, "" if there is none: the last word of `FinishReason.LENGTH`, an object's type."""
    if isinstance(value, Mapping):  # as SGLang writes it
        value = value.get("type")
    return value.strip().lower().rpartition(".")[2] if isinstance(value, str) else "" if value is None else "unknown"
