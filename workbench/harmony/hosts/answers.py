"""The answer in a host's reply: harmony messages, token ids where the host gives them, and routed experts.

Reasoning comes beside the content (chat completions), as items of its own (Responses), in `<think>` tags, or within the
content with harmony's marks, kept or stripped; `workbench.harmony.chat_messages` reads them all. Only what hosts give
as the model's own words is called verbatim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from workbench.errors import InputError
from workbench.harmony.chat_messages import from_chat_messages
from workbench.harmony.completion import is_complete
from workbench.harmony.formats.shapes import with_preambles


@dataclass(frozen=True)
class Answer:
    """An assistant's messages. reasoning: verbatim, summary, or absent. complete: whether it ended by itself.

    ids: those of the prompt and of the answer, if the host gave both. irregular: whether tags of the reasoning are
    nested or left over.
    """

    messages: list[dict[str, Any]]
    reasoning: str
    complete: bool
    about: dict[str, Any] = field(default_factory=dict)
    ids: tuple[list[int], list[int]] | None = None
    irregular: bool = False


class NoAnswerError(ValueError):
    """A reply that holds no answer; why, in one line."""


def from_chat(reply: Any) -> Answer:
    """Return the answer of `/chat/completions`."""
    choice = _first(_get(reply, "choices", list), "choices")
    message = _get(choice, "message", dict)
    return _answer([{**message, "role": "assistant"}], True, choice, reply)


def from_responses(reply: Any) -> Answer:
    """Return the answer of `/responses`: items of reasoning, messages and calls."""
    items = with_preambles(_get(reply, "output", list))
    return _answer(items, reply.get("status", "completed") == "completed", reply, reply)


def from_completion(reply: Any) -> tuple[str, bool, dict[str, Any], tuple[list[int], list[int]] | None]:
    """Return the text of `/completions` after the prompt, whether it ended by itself, its metadata, and its ids."""
    choice = _first(_get(reply, "choices", list), "choices")
    return _get(choice, "text", str), choice.get("finish_reason") == "stop", _about(choice, reply), _ids(choice, reply)


def first_choice(reply: Any) -> Mapping[str, Any]:
    """Return the first of a reply's choices."""
    return _first(_get(reply, "choices", list), "choices")


def _answer(messages: list[Any], complete: bool, choice: Mapping[str, Any], reply: Mapping[str, Any]) -> Answer:
    try:
        complete = complete and is_complete(choice) is not False
        answer = from_chat_messages(messages, truncated=not complete, split=True) if messages else None
    except InputError as error:
        raise NoAnswerError(str(error)) from error
    written = [m for m in answer.messages if m["content"] or m.get("recipient") or m.get("raw")] if answer else []
    if answer is None or not written:
        raise NoAnswerError("the reply holds no text")
    has_analysis = any(m.get("channel") == "analysis" for m in written)
    reasoning = ("summary" if answer.summary else "verbatim") if has_analysis else "absent"
    complete = complete and answer.complete is not False
    return Answer(written, reasoning, complete, _about(choice, reply), _ids(choice, reply), answer.irregular)


def _ids(choice: Mapping[str, Any], reply: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """Return ids of the prompt and the answer, as vLLM gives them for `return_token_ids`."""
    prompt, ids = choice.get("prompt_token_ids", reply.get("prompt_token_ids")), choice.get("token_ids")
    return (prompt, ids) if _are_ids(prompt) and _are_ids(ids) else None


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(id) is int and id >= 0 for id in value)


def _about(choice: Mapping[str, Any], reply: Mapping[str, Any]) -> dict[str, Any]:
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    assert isinstance(usage, dict)
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    counts = {
        "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
        "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "reasoning_tokens": details.get("reasoning_tokens") if isinstance(details, dict) else None,
    }
    about = {"finish_reason": choice.get("finish_reason") or choice.get("status"), "served_model": reply.get("model")}
    return {k: v for k, v in (about | counts).items() if isinstance(v, int | str)}


def _get(where: Any, name: str, kind: type) -> Any:
    value = where.get(name) if isinstance(where, dict) else None
    if not isinstance(value, kind):
        raise NoAnswerError(f"the reply has no {name}: it is not what an OpenAI-compatible host answers")
    return value


def _first(values: list[Any], name: str) -> dict[str, Any]:
    if not values or not isinstance(values[0], dict):
        raise NoAnswerError(f"the reply's {name} are empty")
    return values[0]
