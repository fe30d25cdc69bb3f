"""What a host answered, in the dialects that are spoken: harmony messages, and how true to the model they are.

Reasoning comes as `reasoning_content` or `reasoning` beside the content (chat completions), as items of their own
(Responses), in <think> tags, or inside the content with harmony's marks, kept or stripped. Only what hosts give as the
model's own words is called verbatim.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MESSAGE = re.compile(
    r"(?:<\|start\|>)?(?:assistant)?(?P<header>[^<]*)(?:<\|channel\|>(?P<channel>\w+)(?P<rest>[^<]*))?"
    r"(?:<\|constrain\|>(?P<type>[\w.]+))?<\|message\|>(?P<content>.*?)(?:<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
_STRIPPED = re.compile(r"\Aanalysis(?P<analysis>.*?)(?:assistant)?final(?P<final>.*)\Z", re.DOTALL)
_BARE_FINAL = re.compile(r"final(?=[^a-z\s])")  # marks stripped, no analysis; "finally" and "final answer" are words
_THINK = re.compile(r"\A\s*<think>(?P<analysis>.*?)</think>\s*(?P<final>.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """messages: assistant's, with channels. reasoning: verbatim, summary, or absent. complete: it ended by itself."""

    messages: list[dict[str, Any]]
    reasoning: str
    complete: bool
    about: dict[str, Any] = field(default_factory=dict)


class NoAnswerError(ValueError):
    """A reply that holds no answer; why, in one line."""


def from_chat(reply: Any) -> Answer:
    """Of `/chat/completions`."""
    choice = _first(_get(reply, "choices", list), "choices")
    message = _get(choice, "message", dict)
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    content = _text(message.get("content"))
    messages, verbatim = split(content) if not reasoning else ([_final(content)] if content else [], True)
    if reasoning:
        messages = [_analysis(reasoning), *messages]
    messages += [call(each) for each in message.get("tool_calls") or []]
    return _answer(messages, verbatim, choice.get("finish_reason") in ("stop", "tool_calls", None), choice, reply)


def from_responses(reply: Any) -> Answer:
    """Of `/responses`: reasoning items whose content is the model's words, or only a summary of them."""
    messages: list[dict[str, Any]] = []
    verbatim = True
    for item in _get(reply, "output", list):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "reasoning":
            words, summary = _text(item.get("content")), _text(item.get("summary"))
            verbatim = verbatim and bool(words or not summary)
            messages += [_analysis(words or summary)] if words or summary else []
        elif kind == "message":
            messages.append(_final(_text(item.get("content"))))
        elif kind == "function_call":
            messages.append(call({"function": item}))
    return _answer(messages, verbatim, reply.get("status", "completed") == "completed", reply, reply)


def from_completion(reply: Any) -> tuple[str, bool, dict[str, Any]]:
    """Of `/completions`: the text behind the prompt, whether it ended by itself, and what is said of it."""
    choice = _first(_get(reply, "choices", list), "choices")
    return _get(choice, "text", str), choice.get("finish_reason") == "stop", _about(choice, reply)


def split(content: str) -> tuple[list[dict[str, Any]], bool]:
    """Messages of a content that may hold the reasoning too; and whether what it holds is the model's own words."""
    if "<|message|>" in content:
        head = "" if content.lstrip().startswith(("<|start|>", "<|channel|>")) else "<|start|>assistant"
        found = [_marked(match) for match in _MESSAGE.finditer(head + content)]
        return [m for m in found if m["content"] or m.get("recipient")], True
    if match := _BARE_FINAL.match(content):
        return [_final(content[match.end() :])], True
    for pattern in (_STRIPPED, _THINK):
        if match := pattern.match(content):
            return [_analysis(match["analysis"]), _final(match["final"])], True
    return ([_final(content)] if content else []), True


def _marked(match: "re.Match[str]") -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": match["content"], "channel": match["channel"] or "final"}
    if to := re.search(r"to=(\S+)", (match["header"] or "") + " " + (match["rest"] or "")):
        found |= {"recipient": to[1]}
    if match["type"]:
        found |= {"content_type": match["type"]}
    return found


def _answer(messages: list[dict[str, Any]], verbatim: bool, complete: bool, choice: Any, reply: Any) -> Answer:
    if not messages:
        raise NoAnswerError("the reply holds no text")
    thought = any(m.get("channel") == "analysis" for m in messages)
    reasoning = ("verbatim" if verbatim else "summary") if thought else "absent"
    return Answer(messages, reasoning, complete, _about(choice, reply))


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


def _analysis(text: str) -> dict[str, Any]:
    return {"role": "assistant", "channel": "analysis", "content": text}


def _final(text: str) -> dict[str, Any]:
    return {"role": "assistant", "channel": "final", "content": text}


def call(made: Any) -> dict[str, Any]:
    """A tool call as chat completions have it, as a message."""
    function = made.get("function") if isinstance(made, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise NoAnswerError("a tool call without a function's name")
    arguments = function.get("arguments", "")
    return {
        "role": "assistant", "channel": "commentary", "recipient": f"functions.{function['name']}", "content_type": "json",
        "content": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }  # fmt: skip


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "".join(_text(part.get("text") or part.get("reasoning")) for part in value if isinstance(part, dict))
    return ""


def _get(where: Any, name: str, kind: type) -> Any:
    value = where.get(name) if isinstance(where, dict) else None
    if not isinstance(value, kind):
        raise NoAnswerError(f"the reply has no {name}: it is not what an OpenAI-compatible host answers")
    return value


def _first(values: list[Any], name: str) -> dict[str, Any]:
    if not values or not isinstance(values[0], dict):
        raise NoAnswerError(f"the reply's {name} are empty")
    return values[0]
