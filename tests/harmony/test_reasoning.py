"""One reasoning under several names is read once; two different ones are refused, and none is dropped silently."""

from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.chat_messages import ChatMessages, from_chat_messages
from workbench.harmony.hosts.answers import NoAnswerError, from_chat
from workbench.harmony.message_fields import left_out_fields
from workbench.harmony.reasoning import reasoning_beside

ASK = {"role": "user", "content": "6*7"}
THINK = [("analysis", "six sevens"), ("final", "42")]


def read(message: dict[str, Any]) -> ChatMessages:
    return from_chat_messages([ASK, {"role": "assistant", "content": "42", **message}], split=True)


def pairs(chat: ChatMessages) -> list[tuple[str, str]]:
    return [(m["channel"], m["content"]) for m in chat.messages if m["role"] == "assistant"]


SAME: dict[str, dict[str, Any]] = {
    "two fields": {"reasoning": "six sevens", "reasoning_content": "six sevens"},
    "another line end": {"reasoning": "six sevens", "thinking": "six\nsevens\n"},
    "a field and its details": {"reasoning": "six sevens", "reasoning_details": [{"text": "six "}, {"text": "sevens"}]},
    "a field and tags": {"reasoning": "six sevens", "content": "<think>six sevens</think>42"},
    "a field and marks": {
        "reasoning": "six sevens",
        "content": "<|channel|>analysis<|message|>six sevens<|end|><|start|>assistant<|channel|>final<|message|>42",
    },
    "a field and a part": {
        "reasoning": "six sevens",
        "content": [{"type": "thinking", "thinking": "six sevens"}, {"type": "text", "text": "42"}],
    },
    "a field and a summary of it": {"reasoning": "six sevens", "reasoning_details": {"summary": "multiplied"}},
}
DIFFERENT: dict[str, dict[str, Any]] = {
    "two fields": {"reasoning": "six sevens", "reasoning_content": "seven sixes"},
    "a field and its details": {"reasoning": "six sevens", "reasoning_details": [{"text": "seven sixes"}]},
    "a field and tags": {"reasoning": "six sevens", "content": "<think>seven sixes</think>42"},
    "a field and stripped marks": {"reasoning": "six sevens", "content": "analysisseven sixesassistantfinal42"},
    "a field and a part": {
        "reasoning": "six sevens",
        "content": [{"type": "thinking", "thinking": "seven sixes"}, {"type": "text", "text": "42"}],
    },
}


@pytest.mark.parametrize("message", SAME.values(), ids=SAME.keys())
def test_the_same_reasoning_twice_is_one(message: dict[str, Any]) -> None:
    chat = read(message)
    assert [(channel, " ".join(text.split())) for channel, text in pairs(chat)] == THINK
    assert (chat.summary, chat.irregular, chat.left_out) == (False, False, [])


@pytest.mark.parametrize("message", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_two_different_reasonings_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^message 2: its reasoning.* and its .* are not the same text: keep one"):
        read(message)
    with pytest.raises(NoAnswerError, match="not the same text"):
        from_chat({"choices": [{"message": {"content": "42", **message}, "finish_reason": "stop"}]})
    read({name: value for name, value in message.items() if name != "reasoning"})  # negative control: one is read


def test_the_first_of_two_fields_alone_would_not_be_noticed() -> None:
    """The negative control: what was read before is in the first field alone."""
    assert reasoning_beside({"reasoning_content": "six sevens"}) == ("six sevens", False)


@pytest.mark.parametrize(
    "field",
    [
        {"reasoning_text": "six sevens"},
        {"thinking_blocks": [{"type": "thinking", "thinking": "six sevens", "signature": "s"}]},
        {"additional_kwargs": {"reasoning_content": "six sevens", "refusal": None}},
        {"provider_specific_fields": {"reasoning": "six sevens"}},
        {"chain_of_thought": "six sevens"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_reasoning_under_the_names_of_other_programs_is_read(field: dict[str, Any]) -> None:
    chat = read(field)
    assert (pairs(chat), chat.left_out) == (THINK, [])
    chat = read({"summary_of_friends": "six sevens"})  # negative control: another name is noted
    assert (pairs(chat), len(chat.left_out)) == (THINK[1:], 1)


def test_an_object_of_a_program_with_more_than_reasoning_is_noted() -> None:
    assert read({"additional_kwargs": {"reasoning": "six sevens", "audio": {"id": 1}}}).left_out


def test_what_only_an_answer_has_is_named_where_it_is_left_out() -> None:
    chat = from_chat_messages([{**ASK, "reasoning": "I ask"}, {"role": "assistant", "content": "4", "refusal": "no"}])
    assert chat.left_out == ["the field 'reasoning' of a message", "the field 'refusal' of a message"]
    chat = from_chat_messages([{**ASK, "value": "7*6", "thinking": ""}, {"role": "assistant", "content": "4"}])
    assert chat.left_out == ["the field 'value' of a message"]
    assert left_out_fields({"reasoning": "six sevens", "content": "42"}, "assistant") == []


def test_a_call_in_the_old_form_and_the_new_one_is_one_call() -> None:
    call = {"name": "calc", "arguments": "{}"}
    message = {"role": "assistant", "content": None, "function_call": call, "tool_calls": [{"function": call}]}
    assert len(from_chat_messages([ASK, message]).messages) == 2
    other = message | {"function_call": {"name": "calc", "arguments": "1"}}
    assert len(from_chat_messages([ASK, other]).messages) == 3  # negative control: another call is kept


def test_irregular_tags_are_flagged_in_an_answer_of_a_host() -> None:
    reply = {"choices": [{"message": {"content": "<think>a<think>b</think>c</think>d"}, "finish_reason": "stop"}]}
    assert from_chat(reply).irregular
    reply = {"choices": [{"message": {"content": "<think>a</think>d"}, "finish_reason": "stop"}]}
    assert not from_chat(reply).irregular


def test_marks_in_a_message_that_names_its_channel_are_irregular() -> None:
    marked = "<|channel|>analysis<|message|>I think<|end|><|start|>assistant<|channel|>final<|message|>42"
    assert read({"content": marked, "channel": "final"}).irregular
    assert not read({"channel": "final"}).irregular


def test_the_input_of_a_custom_tool_is_text_and_that_of_a_function_json() -> None:
    custom = read({"tool_calls": [{"id": "a", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]})
    assert (custom.messages[-1]["content"], custom.messages[-1].get("content_type")) == ("ls", None)
    function = read({"tool_calls": [{"id": "a", "function": {"name": "sh", "arguments": "{}"}}]})
    assert function.messages[-1]["content_type"] == "json"
