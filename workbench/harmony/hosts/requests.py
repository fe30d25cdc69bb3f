"""A conversation in the form that a host's API takes: chat completions or Responses.

Calls keep their ids, results name the call they answer, and the reasoning between tool calls of an open turn is sent
as `reasoning`, which vLLM and sglang put back into the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.harmony.rendering import without_earlier_analysis

Messages = Sequence[Mapping[str, Any]]


def chat_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return messages for `/chat/completions`. What an assistant wrote before a tool result is one message."""
    sent: list[dict[str, Any]] = []
    for message, call_id in _with_call_ids(without_earlier_analysis(messages, generation_prompt=True)):
        role = message["role"]
        if role == "tool":
            sent.append({"role": "tool", "tool_call_id": call_id, "content": message["content"]})
        elif role != "assistant":
            sent.append({k: message[k] for k in ("role", "content", "name") if message.get(k) is not None})
        else:
            _add_to_turn(sent, message, call_id)
    return sent


def _add_to_turn(sent: list[dict[str, Any]], message: Mapping[str, Any], call_id: str) -> None:
    """Add a message of an assistant to the turn it belongs to, or begin one."""
    called = message.get("recipient") not in (None, "all")
    kind = "tool_calls" if called else "reasoning" if message.get("channel") == "analysis" else "content"
    open_turn = sent and sent[-1]["role"] == "assistant" and not (sent[-1].get("tool_calls") and not called)
    if not open_turn or (kind != "tool_calls" and sent[-1].get(kind)) or (kind == "reasoning" and sent[-1]["content"]):
        sent.append({"role": "assistant", "content": None})
    turn = sent[-1]
    if called:
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": _function(message)})
    else:
        turn[kind] = message["content"]


def responses_input(messages: Messages) -> list[dict[str, Any]]:
    """Return items for `/responses`."""
    sent: list[dict[str, Any]] = []
    for message, call_id in _with_call_ids(without_earlier_analysis(messages, generation_prompt=True)):
        role, content = message["role"], message["content"]
        if role == "tool":
            sent.append({"type": "function_call_output", "call_id": call_id, "output": content})
        elif role == "assistant" and message.get("recipient") not in (None, "all"):
            sent.append({"type": "function_call", "call_id": call_id, **_function(message)})
        elif role == "assistant" and message.get("channel") == "analysis":
            parts = [{"type": "reasoning_text", "text": content}]
            sent.append({"type": "reasoning", "id": f"rs_{len(sent)}", "summary": [], "content": parts})
        else:
            sent.append({"role": role, "content": content})
    return sent


def responses_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return definitions of functions as Responses has them: without the object around the function."""
    return [{"type": "function", **tool["function"]} if "function" in tool else dict(tool) for tool in tools]


def _with_call_ids(messages: Messages) -> list[tuple[Mapping[str, Any], str]]:
    """Return every message with the id of its call; results answer the calls before them in order."""
    with_ids: list[tuple[Mapping[str, Any], str]] = []
    open_calls: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        call_id = ""
        if message["role"] == "assistant" and message.get("recipient") not in (None, "all"):
            call_id = f"call_{number}"
            open_calls.append((message["recipient"], call_id))
        elif message["role"] == "tool":
            answered = next((call for call in open_calls if call[0] == message.get("name")), None)
            if answered is not None:
                open_calls.remove(answered)
                call_id = answered[1]
        with_ids.append((message, call_id))
    return with_ids


def _function(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": message["recipient"].removeprefix("functions."), "arguments": message["content"]}
