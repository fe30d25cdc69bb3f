"""Messages in harmony's form: the effort they ask for, and what cannot be rendered."""

from types import SimpleNamespace
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.messages import check_messages, effort_in_text, effort_of, leading, settled_effort, shown

ASKED = {"role": "user", "content": "2+2"}


@pytest.mark.parametrize("value", ["high", " High ", "HIGH", SimpleNamespace(value="High")])
def test_an_effort_is_read_in_any_case(value: Any) -> None:
    assert effort_of(value) == "high"


@pytest.mark.parametrize("value", ["", "maximum", None, 3, ["high"]])
def test_another_effort_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="choose from low, medium, high"):
        effort_of(value)


def test_the_system_text_may_ask_for_an_effort_in_a_line_of_its_own() -> None:
    system = {"role": "system", "content": "You are Ada.\nReasoning: High"}
    assert effort_in_text([system, ASKED]) == "high"
    assert effort_in_text([{**system, "role": "user"}]) is None, "a user's text is text"
    assert effort_in_text([{**system, "content": "My reasoning: high stakes"}]) is None
    assert settled_effort(None, [system]) == settled_effort("high", [system]) == "high"
    with pytest.raises(InputError, match="the effort is low, but the system text has a line that asks for high"):
        settled_effort("low", [system])
    with pytest.raises(InputError, match="asks for the efforts high and low"):
        effort_in_text([system, {"role": "developer", "content": "reasoning effort: low"}])


def test_leading_messages_are_those_before_the_conversation() -> None:
    system = {"role": "system", "content": ""}
    assert leading([system, {"role": "developer", "content": ""}, ASKED, system]) == 2
    assert leading([system]) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "expected an object"),
        ({"role": "robot", "content": ""}, "unknown role 'robot'"),
        ({"role": "user", "content": None}, "its content is None"),
        ({"role": "user", "content": "", "chanel": "final"}, "unknown field 'chanel'"),
        ({"role": "assistant", "content": "", "channel": "a b"}, "one word"),
        ({"role": "assistant", "content": "", "channel": "<|end|>"}, "one word"),
        ({"role": "tool", "content": ""}, "needs the tool's name"),
        ({"role": "assistant", "content": "", "raw": ""}, "raw is ''"),
    ],
)
def test_a_message_that_cannot_be_rendered_is_named(message: Any, reason: str) -> None:
    check_messages([ASKED])
    with pytest.raises(InputError, match=f"^message 2: .*{reason}"):
        check_messages([ASKED, message])


def test_messages_are_a_list_of_at_least_one() -> None:
    for wrong in ([], "text", None, {"role": "user"}):
        with pytest.raises(InputError, match="expected a list of at least one message"):
            check_messages(wrong)
    with pytest.raises(InputError, match="a leading system message has no channel"):
        check_messages([{"role": "system", "content": "", "channel": "final"}])


def test_a_quoted_value_is_one_short_line_of_ascii() -> None:
    assert shown("a\n\x1b[31m") == repr("a\n\x1b[31m")
    assert len(shown("x" * 1000)) <= 60
