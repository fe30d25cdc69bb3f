"""Tools in the forms of several programs are the same functions; what gpt-oss has no form for is named."""

import json
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.tool_definitions import NO_TOOLS, Function, read_tools

SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
CHAT = {"type": "function", "function": {"name": "search", "description": "Search.", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "tools",
    [
        [CHAT],
        [{"type": "function", "name": "search", "description": "Search.", "parameters": SCHEMA}],
        [{"name": "search", "description": "Search.", "input_schema": SCHEMA}],
        json.dumps([CHAT]),
    ],
)
def test_a_function_is_the_same_in_every_form(tools: Any) -> None:
    assert read_tools(tools).functions == (Function("search", "Search.", json.dumps(SCHEMA)),)
    assert read_tools(tools).functions[0].definition() == CHAT


def test_tools_without_a_form_are_named_and_nothing_is_invented() -> None:
    assert read_tools([{"type": "image_generation"}]).unknown == ("image_generation",)
    assert read_tools(None) == read_tools([]) == read_tools("") == NO_TOOLS


@pytest.mark.parametrize(
    ("tools", "builtin", "reason"),
    [
        ("[{", None, "expected a list of definitions"),
        (3, None, "expected a list of definitions"),
        ([3], None, "expected an object with a name"),
        ([{"type": "function", "function": {"name": ""}}], None, "a tool's name is"),
        ([{**CHAT, "function": {"name": "f", "parameters": 3}}], None, "parameters as a JSON schema"),
        (None, ["shell"], "unknown built-in tool 'shell'"),
        (None, "python", "expected a list with browser, python or both"),
    ],
)
def test_a_wrong_definition_is_one_line(tools: Any, builtin: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_tools(tools, builtin)


def test_built_in_tools_are_named() -> None:
    assert read_tools(None, ["python", "browser"]).builtin == ("browser", "python")
