"""A conversation of another program becomes a transcript row, or an error that states what it lacks."""

from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.formats.conversation import Conversation, error_text, transcript_row

MESSAGES = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4", "reasoning_content": "It is 4."}]


def row(**fields: Any) -> dict[str, Any]:
    return transcript_row(Conversation(**{"messages": MESSAGES, "id": "a", "effort": "low"} | fields), None)


def test_reasoning_and_answer_are_messages_of_their_channels() -> None:
    transcript = row()
    assert [(m.get("channel"), m["content"]) for m in transcript["messages"]] == [
        (None, "2+2"),
        ("analysis", "It is 4."),
        ("final", "4"),
    ]
    assert (transcript["id"], transcript["prompt_id"], transcript["effort"]) == ("a", "a", "low")
    assert transcript["meta"]["reasoning"] == "verbatim"


def test_stored_ids_are_kept_as_they_are() -> None:
    transcript = row(tokens=([1, 2, 3], 2))
    assert (transcript["tokens"], transcript["n_prompt"]) == ([1, 2, 3], 2)
    assert "messages" not in transcript


def test_the_effort_is_never_guessed() -> None:
    with pytest.raises(InputError, match="its effort is not stated: give --effort"):
        row(effort=None)
    assert transcript_row(Conversation(MESSAGES, "a"), "high")["effort"] == "high"


def calling(*answered: str) -> list[dict[str, Any]]:
    """Two calls, a and b, and results that name the calls which they answer."""
    calls = [{"id": id, "type": "function", "function": {"name": f"f_{id}", "arguments": "{}"}} for id in "ab"]
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in answered]
    return [MESSAGES[0], {"role": "assistant", "tool_calls": calls}, *results, MESSAGES[1]]


def test_a_result_belongs_to_the_call_that_it_names() -> None:
    names = [m["name"] for m in row(messages=calling("b", "a"))["messages"] if m["role"] == "tool"]
    assert names == ["functions.f_b", "functions.f_a"]
    with pytest.raises(InputError, match="answers the call 'c', which no message before it makes"):
        row(messages=calling("c", "a"))
    # a negative control: one call without an answer is the only one that is meant
    names = [m["name"] for m in row(messages=calling("b", "c"))["messages"] if m["role"] == "tool"]
    assert names == ["functions.f_b", "functions.f_a"]


def test_a_conversation_without_a_response_is_refused() -> None:
    with pytest.raises(InputError, match="it has no message of an assistant"):
        row(messages=MESSAGES[:1])


def test_tools_that_have_no_form_are_noted() -> None:
    assert "tools_not_rendered" in row(options={"tools": [{"type": "image_generation"}]})["notes"]
    assert "notes" not in row()


def test_an_error_is_one_line() -> None:
    assert error_text(KeyError("id")) == "'id' is missing"
    assert error_text(ValueError("no")) == "no"


def answering(*results: tuple[object, str], ids: tuple[object, object] = (7, 8)) -> list[str]:
    """Names of the tools whose results (id, content) follow the calls `a` and `b` with these ids."""
    calls = [{"id": id, "function": {"name": name, "arguments": "{}"}} for id, name in zip(ids, "ab", strict=True)]
    given = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in results]
    messages = row(messages=[MESSAGES[0], {"role": "assistant", "tool_calls": calls}, *given, MESSAGES[1]])["messages"]
    return [m["name"] for m in messages if m["role"] == "tool"]


def test_ids_of_calls_may_be_numbers_or_all_the_same() -> None:
    assert answering((8, "of b"), (7, "of a")) == ["functions.b", "functions.a"]
    assert answering((0, "of b"), (1, "of a"), ids=(1, 0)) == ["functions.b", "functions.a"]
    assert answering(("c", "first"), ("c", "second"), ids=("c", "c")) == ["functions.a", "functions.b"]


def test_a_result_whose_name_contradicts_its_call_is_refused() -> None:
    messages = calling("a", "b")
    messages[2] = messages[2] | {"name": "f_a"}
    row(messages=messages)
    messages[2] = messages[2] | {"name": "f_b"}
    with pytest.raises(InputError, match=r"answers a call of functions.f_a, and its name is 'f_b'"):
        row(messages=messages)


def test_a_result_with_the_id_of_no_call_is_irregular() -> None:
    assert "irregular" in row(messages=calling("b", "c"))["notes"]
    assert "irregular" not in row(messages=calling("b", "a")).get("notes", [])


def test_what_a_message_has_that_nothing_reads_is_noted() -> None:
    for field in ({"audio": {"data": "AAAA"}}, {"additional_kwargs": {"tool_calls": [{"id": "a"}]}}, {"thinking": 5}):
        assert "fields_left_out" in row(messages=[MESSAGES[0], {**MESSAGES[1], **field}])["notes"], field
    assert "images_left_out" in row(messages=[{**MESSAGES[0], "images": "AAAA"}, MESSAGES[1]])["notes"]
    assert "notes" not in row(messages=[MESSAGES[0], {**MESSAGES[1], "audio": None, "thinking": " "}]), "a control"


def test_a_message_with_an_empty_list_of_parts_is_an_empty_message() -> None:
    messages = row(messages=[MESSAGES[0], {"role": "assistant", "content": []}, MESSAGES[0], MESSAGES[1]])["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "assistant"]


CALL = {"name": "calc", "args": {"x": 1}, "id": "a", "type": "tool_call"}


def test_the_arguments_of_a_call_are_read_under_the_names_of_other_programs() -> None:
    message = row(messages=[MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}])["messages"][1]
    assert message["content"] == '{"x": 1}'
    other = {name: value for name, value in CALL.items() if name != "args"} | {"payload": {"x": 1}}
    read = row(messages=[MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [other]}])
    assert "fields_left_out" in read["notes"]  # negative control: an unknown name is noted


def test_the_output_of_a_call_of_mcp_is_its_result() -> None:
    call = {"type": "mcp_call", "id": "m", "name": "calc", "arguments": "{}", "output": "42"}
    contents = [m["content"] for m in row(messages=[MESSAGES[0], call, MESSAGES[1]])["messages"]]
    assert contents[1:3] == ["{}", "42"]
    no_output = {name: value for name, value in call.items() if name != "output"}
    assert len(row(messages=[MESSAGES[0], no_output, MESSAGES[1]])["messages"]) == len(contents) - 1  # negative control


def test_a_result_with_a_name_answers_its_call() -> None:
    calls = [{"id": "", "function": {"name": name, "arguments": "{}"}} for name in ("calc", "other")]
    results = [{"role": "tool", "name": "calc", "content": "1"}, {"role": "tool", "content": "2"}]
    read = row(messages=[MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": calls}, *results, MESSAGES[1]])
    assert [m["name"] for m in read["messages"] if m["role"] == "tool"] == ["functions.calc", "functions.other"]


def test_messages_of_langchain_are_read() -> None:
    ai = {"type": "ai", "content": "42", "additional_kwargs": {"reasoning_content": "six sevens"}}
    for messages in (
        [{"type": "human", "content": "6*7"}, ai],
        [{"type": "human", "data": {"content": "6*7"}}, {"type": "ai", "data": ai}],
    ):
        assert [m["content"] for m in row(messages=messages)["messages"]] == ["6*7", "six sevens", "42"]
