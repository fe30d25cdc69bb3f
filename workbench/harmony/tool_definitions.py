"""Definitions of tools in their usual forms, for the messages that list the tools for the model.

Functions come as chat completions have them (`{"type": "function", "function": {…}}`), as Responses and Inspect have
them (`{"name", "description", "parameters"}`), or with an `input_schema`. Browser and python are built in: gpt-oss
was trained on them and needs their names only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.messages import shown

BUILTIN = ("browser", "python")
_BUILTIN_TYPES = {
    "browser": "browser",
    "browser_search": "browser",
    "web_search": "browser",
    "web_search_preview": "browser",
    "python": "python",
    "code_interpreter": "python",
}


@dataclass(frozen=True)
class Function:
    """A function the model may call. parameters: a JSON schema, as JSON text, or ""."""

    name: str
    description: str = ""
    parameters: str = ""

    def definition(self) -> dict[str, Any]:
        """Return the definition as chat completions have it."""
        schema = {"parameters": parse_json(self.parameters)} if self.parameters else {}
        return {"type": "function", "function": {"name": self.name, "description": self.description} | schema}


@dataclass(frozen=True)
class Tools:
    """Functions and built-in tools. unknown: names of those that gpt-oss has no form for."""

    functions: tuple[Function, ...] = ()
    builtin: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


NO_TOOLS = Tools()


def read_tools(tools: Any, builtin_tools: Any = None) -> Tools:
    """Return definitions sorted into functions and built-in tools.

    Raises:
        InputError: the value is not a list of tool definitions.
    """
    if isinstance(tools, str):
        tools = _parsed(tools)
    if tools is not None and not isinstance(tools, Sequence):
        raise InputError(f"tools is {shown(tools)}; expected a list of definitions")
    functions: list[Function] = []
    builtin, unknown = list(_builtin_names(builtin_tools)), list[str]()
    for tool in tools or []:
        if not isinstance(tool, Mapping):
            raise InputError(f"a tool is {shown(tool)}; expected an object with a name")
        kind = str(tool.get("type", "function"))
        definition = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        if kind in _BUILTIN_TYPES:
            builtin.append(_BUILTIN_TYPES[kind])
        elif kind == "function" or (kind == "custom" and "input_schema" in tool):
            functions.append(_function(definition))
        else:
            unknown.append(kind)
    return Tools(tuple(functions), tuple(name for name in BUILTIN if name in builtin), tuple(unknown))


def _parsed(text: str) -> Any:
    try:
        return parse_json(text) if text.strip() else None
    except InputError as error:
        raise InputError(f"tools is {shown(text)}; expected a list of definitions: {error}") from error


def _builtin_names(names: Any) -> list[str]:
    if names is None:
        return []
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"builtin_tools is {shown(names)}; expected a list with browser, python or both")
    if unknown := [name for name in names if name not in BUILTIN]:
        raise InputError(f"unknown built-in tool {shown(unknown[0])}: choose from {', '.join(BUILTIN)}")
    return list(names)


def _function(definition: Any) -> Function:
    name, description = definition.get("name"), definition.get("description")
    parameters = definition.get("parameters", definition.get("input_schema"))
    if not isinstance(name, str) or not name:
        raise InputError(f"a tool's name is {shown(name)}; expected text")
    if not isinstance(description, str | None) or not isinstance(parameters, Mapping | None):
        raise InputError(f"the tool {shown(name)} needs a description in text and parameters as a JSON schema")
    return Function(name, description or "", json.dumps(parameters) if parameters else "")
