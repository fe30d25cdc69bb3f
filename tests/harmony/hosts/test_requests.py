"""A conversation in the forms of chat completions and Responses: calls and results keep their ids."""

from typing import Any

from workbench.harmony.hosts.requests import chat_messages, responses_input, responses_tools

ASKED = {"role": "user", "content": "weather?"}
ANALYSIS = {"role": "assistant", "channel": "analysis", "content": "Ask the tool."}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "channel": "commentary", "recipient": f"functions.{name}", "content": arguments}


def result(name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "name": f"functions.{name}", "content": content}


TURN = [ASKED, ANALYSIS, call("a", "{}"), call("b", "{}"), result("b", "2"), result("a", "1")]


def test_reasoning_and_calls_of_an_open_turn_are_one_message() -> None:
    user, assistant, *results = chat_messages(TURN)
    assert user == ASKED
    assert assistant["reasoning"] == "Ask the tool."
    calls = {c["function"]["name"]: c["id"] for c in assistant["tool_calls"]}
    assert [r["tool_call_id"] for r in results] == [calls["b"], calls["a"]], "results name the call that they answer"
    assert len(set(calls.values())) == 2


def test_the_analysis_of_earlier_turns_is_left_out() -> None:
    answer = {"role": "assistant", "channel": "final", "content": "sunny"}
    sent = chat_messages([ASKED, ANALYSIS, answer, ASKED])
    assert sent == [ASKED, {"role": "assistant", "content": "sunny"}, ASKED]


def test_responses_have_an_item_for_every_message() -> None:
    items = responses_input(TURN)
    assert [item.get("type", item.get("role")) for item in items] == [
        "user",
        "reasoning",
        "function_call",
        "function_call",
        "function_call_output",
        "function_call_output",
    ]
    assert items[2]["call_id"] == items[5]["call_id"] != items[3]["call_id"]


def test_definitions_lose_the_object_around_the_function() -> None:
    assert responses_tools([{"type": "function", "function": {"name": "a"}}]) == [{"type": "function", "name": "a"}]
