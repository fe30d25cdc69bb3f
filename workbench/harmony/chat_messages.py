"""Messages of chat APIs, agents and evaluation logs in harmony's own form.

Reasoning comes under `thinking`, `reasoning`, `reasoning_content` or `reasoning_details`, as parts of the content, as
items of their own (Responses), or within the text. Tool results are named after the call they answer. Nothing is left
out silently: images are counted, and fields that have no place in a prompt are named.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.completion import OBJECTS, REASONS, is_complete
from workbench.harmony.labels import ROLES
from workbench.harmony.marked_text import is_marked, read_output
from workbench.harmony.message_fields import left_out_fields, with_role
from workbench.harmony.messages import check_messages, shown
from workbench.harmony.reasoning import (
    DifferentReasoningError,
    check_same,
    reasoning_beside,
    reasoning_text,
)

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking", "reasoning_text", "summary_text", "redacted_thinking")
_IMAGE_PARTS = ("image_url", "input_image", "image", "video", "video_url", "input_video")
_BUILTIN_NAMES = ("python", "browser")


@dataclass
class ChatMessages:
    """Messages in harmony's own form, and what became of the rest.

    images: how many were left out. left_out: fields that have no place in a prompt. summary: whether some reasoning is
    a summary of the model's own. complete: False where the output shows that it was cut off, None if nothing is known.
    irregular: whether tags of the reasoning are nested or left over.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    left_out: list[str] = field(default_factory=list)
    summary: bool = False
    complete: bool | None = None
    irregular: bool = False


@dataclass
class _Segment:
    """A piece of an assistant's message, in order: kind is text, analysis or call."""

    kind: str
    content: str
    message: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    recipient: str
    channel: str


def from_chat_messages(
    messages: Any, *, builtin: Sequence[str] = (), truncated: bool = False, split: bool = False
) -> ChatMessages:
    """Read messages of any chat API.

    builtin: tools whose calls go to them by their own name. truncated: whether the last answer was cut off. split:
    whether an assistant's text may hold its reasoning, in marks or in tags; a message given to a model may not.

    Raises:
        InputError: a message cannot be rendered.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        check_messages(messages)
    reader = _Reader(builtin, split)
    for i, message in enumerate(messages, 1):
        try:
            reader.read(message, truncated=truncated and i == len(messages), following=messages[i : i + 1])
        except (_MessageError, DifferentReasoningError) as error:
            raise InputError(f"message {i}: {error}") from error
    check_messages(reader.result.messages)
    return reader.result


class _MessageError(ValueError):
    """Why a message cannot be used, in one line."""


class _Reader:
    """Reads messages in order and remembers the calls that tool results answer."""

    def __init__(self, builtin: Sequence[str], split: bool) -> None:
        self.result = ChatMessages()
        self._builtin, self._split = tuple(builtin), split
        self._calls: dict[str, _Call] = {}
        self._made = 0
        self._unanswered: list[tuple[str, _Call]] = []
        self._last: _Call | None = None

    def read(self, message: Any, truncated: bool, following: Sequence[Any]) -> None:
        if not isinstance(message, Mapping):
            raise _MessageError(f"got {shown(message)}; expected an object with role and content")
        message = with_role(message)
        role = message.get("role")
        if role is None and message.get("type") == "message":
            role = "assistant"
        if role is None and "type" in message:
            self._item(message)
            return
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise _MessageError(
                f"unknown role {shown(role)}; choose from {', '.join(ROLES)}, a tool's own name is its name"
            )
        self._note_fields(message, role)
        if message.get("raw") is not None:
            self.result.messages.append(
                {k: v for k, v in message.items() if k in (*_OWN_FIELDS, "raw") and v is not None}
            )
        elif role == "assistant":
            ended = None if following else _stated_end(message)
            self._assistant(message, truncated or ended is False)
            if ended is False or self.result.complete is None:  # a text that shows its end is a witness too
                self.result.complete = ended
        elif role == "tool":
            self._tool(message)
        else:
            self._given(role, message)

    def _note_fields(self, message: Mapping[str, Any], role: str) -> None:
        self.result.left_out += left_out_fields(message, role)
        images = message.get("images")  # Ollama's
        self.result.images += len(images) if isinstance(images, list) else bool(images)

    def _given(self, role: str, message: Mapping[str, Any]) -> None:
        """A system, developer or user message."""
        content = message.get("content")
        results = [p for p in content if _kind(p) == "tool_result"] if isinstance(content, list) else []
        for result in results:
            self._tool({"content": result.get("content"), "tool_call_id": result.get("tool_use_id")})
        if results:
            content = [part for part in content or [] if part not in results]
            if not content:
                return
        fields = {name: message[name] for name in _HEADER if message.get(name) is not None}
        self.result.messages.append({"role": role, **fields, "content": self._text(content)})

    def _tool(self, message: Mapping[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, Mapping):
            content = json.dumps(content, ensure_ascii=False)
        error = message.get("error")
        if isinstance(error, Mapping) and isinstance(error.get("message"), str):
            content = error["message"]  # Inspect gives this to the model instead of the content
        name = message.get("name") or message.get("function") or message.get("tool_name")
        own = message.get("channel") is not None or message.get("recipient") is not None
        call = self._call_answered(_id(message.get("tool_call_id"), message.get("call_id")), name)
        if own and name:
            recipient, channel = name, message.get("channel") or "commentary"
        elif call is not None:
            recipient, channel = call.recipient, call.channel
        elif isinstance(name, str) and name:
            recipient, channel = self._tool_name(name), "commentary"
        else:
            raise _MessageError(f"a tool's message needs the tool's name, such as functions.search; got {shown(name)}")
        self.result.messages.append(
            {
                "role": "tool",
                "name": recipient,
                "recipient": message.get("recipient") or "assistant",
                "channel": channel,
                "content": self._text(content),
            }
            | ({"content_type": message["content_type"]} if message.get("content_type") else {})
        )

    def _call_answered(self, id: str, name: Any) -> _Call | None:
        """Return the call that a result answers: by its id, by the name, or else the first one without an answer.

        Raises:
            _MessageError: the id is that of no call, and several calls have no answer; or the call with this id is one
                of another tool than the name states.
        """
        names = (name, self._tool_name(name)) if isinstance(name, str) and name else ()
        if id in self._calls:
            same_id = [i for i, (key, _) in enumerate(self._unanswered) if key == id]  # some hosts number all calls 0
            call = self._unanswered.pop(same_id[0])[1] if same_id else self._calls[id]
            if names and call.recipient not in names:
                raise _MessageError(
                    f"a tool's message answers a call of {call.recipient}, and its name is {shown(name)}"
                )
            return call
        if names:
            return self._call_of(names)
        if id and len(self._unanswered) > 1:
            raise _MessageError(f"a tool's message answers the call {shown(id)}, which no message before it makes")
        # the only open call is meant, but its own id is another one
        self.result.irregular |= bool(id and self._unanswered and not self._unanswered[0][0].startswith("#"))
        if self._unanswered:
            return self._unanswered.pop(0)[1]
        return self._last

    def _call_of(self, names: Sequence[str]) -> _Call | None:
        """Return the first call of a tool that has no answer, which now has one, or else its last call."""
        open_call = next((i for i, (_, call) in enumerate(self._unanswered) if call.recipient in names), None)
        if open_call is not None:
            return self._unanswered.pop(open_call)[1]
        return next((call for call in reversed(list(self._calls.values())) if call.recipient in names), None)

    def _tool_name(self, name: str) -> str:
        return name if "." in name or name in self._builtin else f"functions.{name}"

    def _assistant(self, message: Mapping[str, Any], truncated: bool) -> None:
        reasoning, content = self._reasoning(message), self._content(message, truncated)
        own = "".join(text for text in map(_analysis_of, content) if text)
        if reasoning and own:  # hosts give the same reasoning twice: beside the content and within it
            check_same("reasoning beside its content", reasoning[0].content, "reasoning within it", own)
            reasoning = []
        segments = [*reasoning, *content]
        calls = message.get("tool_calls") or []
        if isinstance(calls, str) and calls.lstrip().startswith("["):  # tables keep them as a text
            calls = parse_json(calls)
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise _MessageError(f"tool_calls is {shown(calls)}; expected a list of calls")
        old_form = message.get("function_call")
        if isinstance(old_form, Mapping) and not any(
            isinstance(c, Mapping) and c.get("function") == old_form for c in calls
        ):
            calls = [*calls, {"function": old_form}]
        segments += [_Segment("call", "", self._call(call)) for call in calls]
        self._append(segments, message)

    def _append(self, segments: list[_Segment], message: Mapping[str, Any]) -> None:
        """Give every text its channel: one that something follows is a preamble."""
        segments = _joined(
            [s for s in segments if s.content or s.message or len(segments) == 1 or _has_own(message, s)]
        )
        for i, segment in enumerate(segments):
            if segment.message:
                self.result.messages.append(segment.message)
                continue
            last = i == len(segments) - 1
            channel = {"analysis": "analysis", "text": "final" if last else "commentary"}[segment.kind]
            fields = {name: message[name] for name in _HEADER if message.get(name) is not None}
            if segment.kind == "analysis":
                fields = {}
            elif "recipient" in fields and "channel" not in fields:
                fields["channel"] = "commentary"
            self.result.messages.append({"role": "assistant", "channel": channel, **fields, "content": segment.content})
            if "recipient" in fields:
                self._remember("", _Call(fields["recipient"], fields.get("channel", channel)))

    def _reasoning(self, message: Mapping[str, Any]) -> list[_Segment]:
        """Return the reasoning beside the content."""
        text, summary = reasoning_beside(message)
        self.result.summary |= summary
        return [_Segment("analysis", text)] if text else []

    def _content(self, message: Mapping[str, Any], truncated: bool) -> list[_Segment]:
        content, refusal = message.get("content"), message.get("refusal")
        if content is None and isinstance(refusal, str) and refusal:
            content = refusal
        has_reasoning = bool(self._reasoning(message))
        other = has_reasoning or message.get("tool_calls") or message.get("function_call")
        if content is None and other:
            return []
        if isinstance(content, str):
            if content and self._split and message.get("channel") is None:
                return self._split_text(content, truncated, has_reasoning)
            self.result.irregular |= self._split and is_marked(content)  # of which its channel is one of several
            return [_Segment("text", content)]
        if not isinstance(content, list):
            raise _MessageError(f"its content is {shown(content)}; expected text")
        return [segment for part in content for segment in self._part(part)] if content else [_Segment("text", "")]

    def _split_text(self, content: str, truncated: bool, has_reasoning: bool) -> list[_Segment]:
        output = read_output(content, truncated=truncated)
        if has_reasoning and not is_marked(content) and not any(map(_is_analysis, output.messages)):
            self.result.irregular |= output.irregular
            return [_Segment("text", content)]
        self.result.irregular |= output.irregular
        if output.complete is not None:
            self.result.complete = output.complete
        if len(output.messages) == 1 and output.messages[0] == _final(content):
            return [_Segment("text", content)]
        return [_Segment("call", "", message) for message in output.messages]

    def _part(self, part: Any) -> list[_Segment]:
        kind = _kind(part)
        if isinstance(part, str):
            return [_Segment("text", part)]
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            return [_Segment("text", part["text"])]
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            return [_Segment("text", part["refusal"])]
        if kind in _REASONING_PARTS:
            text, summary = reasoning_text([part])
            self.result.summary |= summary
            return [_Segment("analysis", text)] if text else []
        if kind in ("tool_use", "tool_call", "function_call"):
            return [_Segment("call", "", self._call(part))]
        if kind in _IMAGE_PARTS:
            self.result.images += 1
            return []
        raise _MessageError(f"its content has a part of type {shown(kind)}; expected text, reasoning, images or calls")

    def _text(self, content: Any) -> str:
        """Return the text of a message that is given to a model."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise _MessageError(f"its content is {shown(content)}; expected text")
        segments = [segment for part in content for segment in self._part(part)]
        if any(segment.kind != "text" for segment in segments):
            raise _MessageError("its content has reasoning or a call, which only an assistant's has")
        return "".join(segment.content for segment in segments)

    def _call(self, call: Any) -> dict[str, Any]:
        """Return a tool call of any API as a message."""
        definition = (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None
        fields: Any = definition if isinstance(definition, Mapping) else call
        name = (
            definition if isinstance(definition, str) else fields.get("name") if isinstance(fields, Mapping) else None
        )
        if not isinstance(name, str) or not name:
            raise _MessageError(f"a tool call has no function's name: {shown(call)}")
        arguments = next((fields[k] for k in _ARGUMENTS if fields.get(k) is not None), "")
        self.result.left_out += [
            f"the field {shown(name)} of a tool call"
            for part in ((call, fields) if fields is not call else (call,))
            for name, value in part.items()
            if name not in _OF_CALLS and value not in (None, "", [], {})
        ]
        recipient = self._tool_name(name)
        builtin = recipient.partition(".")[0] in _BUILTIN_NAMES
        made = _Call(recipient, "analysis" if builtin else "commentary")
        self._remember(_id(call.get("call_id"), call.get("id")), made)
        written = {
            "role": "assistant",
            "channel": made.channel,
            "recipient": made.recipient,
            "content": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        }
        if call.get("type") in _OF_TEXT:
            return written
        return written | {"content_type": "code" if recipient == "python" else "json"}

    def _remember(self, id: str, call: _Call) -> None:
        self._made += 1
        key = id or f"#{self._made}"
        self._calls[key] = call
        self._unanswered.append((key, call))
        self._last = call

    def _item(self, item: Mapping[str, Any]) -> None:
        """An item of Responses that is not a message."""
        kind = item["type"]
        if kind == "reasoning":
            text, summary = reasoning_text(item.get("content"))
            if not text:
                text, summary = reasoning_text(item.get("summary"))[0], True
            if text:
                self.result.summary |= summary
                self.result.messages.append({"role": "assistant", "channel": "analysis", "content": text})
        elif kind in ("function_call", "custom_tool_call", "mcp_call"):
            self.result.messages.append(self._call(item))
            if item.get("output") is not None or item.get("error") is not None:  # that of a call of MCP is within it
                output = item["output"] if item.get("output") is not None else item["error"]
                self._tool({"content": output, "tool_call_id": _id(item.get("call_id"), item.get("id"))})
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = item.get("output")
            self._tool({"content": output, "tool_call_id": item.get("call_id")})
        else:
            raise _MessageError(f"an item of type {shown(kind)} cannot be rendered")


_OF_TEXT = ("custom", "custom_tool_call")  # calls whose input is a text, not JSON
_ARGUMENTS = ("arguments", "input", "parameters", "args")
_OF_CALLS = {"id", "call_id", "type", "function", "custom", "name", "index", "status", "output", "error", *_ARGUMENTS}
_HEADER = ("name", "recipient", "channel", "content_type")
_OWN_FIELDS = ("role", "content", *_HEADER)


def _id(*values: Any) -> str:
    """Return the first id of a call that is there, as text; "" if there is none."""
    ids = (value for value in values if isinstance(value, str | int) and not isinstance(value, bool) and value != "")
    return next(map(str, ids), "")


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else type(part).__name__


def _final(text: str) -> dict[str, Any]:
    return {"role": "assistant", "channel": "final", "content": text}


def _stated_end(message: Mapping[str, Any]) -> bool | None:
    """Return whether a message states that it was cut off or ended, in itself or in the metadata of its program."""
    return is_complete({name: message.get(name) for name in (*REASONS, *OBJECTS)})


def _is_analysis(message: Mapping[str, Any]) -> bool:
    return message.get("channel") == "analysis"


def _analysis_of(segment: _Segment) -> str:
    """Return the reasoning in a segment of the content; "" if it is something else."""
    if segment.kind == "analysis":
        return segment.content
    is_analysis = segment.message.get("channel") == "analysis" and not segment.message.get("recipient")
    return str(segment.message.get("content") or "") if is_analysis else ""


def _has_own(message: Mapping[str, Any], segment: _Segment) -> bool:
    """Return whether an empty text is a message of its own: one with a channel that nothing else of it fills."""
    return segment.kind == "text" and message.get("channel") is not None and not message.get("tool_calls")


def _joined(segments: list[_Segment]) -> list[_Segment]:
    """Return neighbouring pieces of the same kind as one."""
    joined: list[_Segment] = []
    for segment in segments:
        if joined and not segment.message and not joined[-1].message and joined[-1].kind == segment.kind:
            joined[-1] = _Segment(segment.kind, joined[-1].content + segment.content)
        else:
            joined.append(segment)
    return joined
