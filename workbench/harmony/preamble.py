"""The messages before a conversation's first turn: the system message, and developer messages with tool definitions.

gpt-oss's own preamble is the text that the harmony library writes. A checkpoint whose chat template writes another
system message was trained on another preamble, and then the template writes it.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.messages import effort_of, shown
from workbench.harmony.templates import TemplateError, render_template
from workbench.harmony.tool_definitions import NO_TOOLS, Tools, read_tools
from workbench.harmony.vocabulary import Tokenizer, harmony_encoding

_ANY_DAY = datetime.date(2025, 8, 5)
_PLACEHOLDER = "INSTRUCTIONSPLACEHOLDER"
_OWN_SYSTEM_TEXT = "# Valid channels:"  # in every system message that gpt-oss was trained on, and in no other text


@dataclass(frozen=True)
class PromptOptions:
    """The content of a system message beside the instructions. date: the "Current date", None where there is none."""

    effort: str = "medium"
    tools: Tools = NO_TOOLS
    model_identity: str | None = None
    knowledge_cutoff: str | None = None
    date: datetime.date | None = None


def prompt_options(
    *,
    effort: Any = "medium",
    tools: Any = None,
    builtin_tools: Any = None,
    model_identity: str | None = None,
    knowledge_cutoff: str | None = None,
    date: datetime.date | str | None = None,
) -> PromptOptions:
    """Return the checked options of a prompt, as a caller or a row gives them.

    Raises:
        InputError: an option has the wrong type.
    """
    for name, value in (("model_identity", model_identity), ("knowledge_cutoff", knowledge_cutoff)):
        if not isinstance(value, str | None):
            raise InputError(f"{name} is {shown(value)}; expected text")
    return PromptOptions(
        effort_of(effort), read_tools(tools, builtin_tools), model_identity, knowledge_cutoff, _date(date)
    )


def _date(value: Any) -> datetime.date | None:
    if isinstance(value, datetime.date | None):
        return value.date() if isinstance(value, datetime.datetime) else value
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise InputError(f"date is {shown(value)}; expected a day, such as 2025-08-05") from None


def is_system_text(text: str) -> bool:
    """Return whether a text is already a system message of gpt-oss, which is then written as it is."""
    return _OWN_SYSTEM_TEXT in text


def preamble(
    leading: Sequence[Mapping[str, Any]], options: PromptOptions, tokenizer: Tokenizer
) -> list[tuple[str, str]] | list[int]:
    """Return role and text of each message before the first turn, or the ids that another model's template writes.

    Raises:
        InputError: a built-in tool that gpt-oss has no form for.
    """
    if options.tools.unknown:
        raise InputError(f"gpt-oss has no format for a tool of type {shown(options.tools.unknown[0])}: remove it")
    template = tokenizer.chat_template
    if template is None:
        return _own(leading, options)
    dated = options if options.date else _with_date(options, datetime.date.today())
    if _is_own(template, tokenizer):
        return _own(leading, dated)
    return _from_template(template, leading, dated, tokenizer)


def _with_date(options: PromptOptions, date: datetime.date) -> PromptOptions:
    return PromptOptions(options.effort, options.tools, options.model_identity, options.knowledge_cutoff, date)


def _own(leading: Sequence[Mapping[str, Any]], options: PromptOptions) -> list[tuple[str, str]]:
    own_system = bool(leading) and leading[0]["role"] == "system" and is_system_text(leading[0]["content"])
    texts = [("system", leading[0]["content"] if own_system else system_text(options))]
    instructions = [message["content"] for message in leading[own_system:]]
    functions = options.tools.functions
    if functions and not instructions:
        instructions = [""]
    for i, text in enumerate(instructions):  # tools are told once, after all instructions
        last = i == len(instructions) - 1
        texts.append(("developer", developer_text(text, options.tools if last else NO_TOOLS)))
    return texts


@functools.lru_cache(maxsize=256)
def system_text(options: PromptOptions) -> str:
    """Return the text of gpt-oss's system message."""
    from openai_harmony import Message, ReasoningEffort, RenderOptions, Role, SystemContent

    system = SystemContent.new().with_reasoning_effort(ReasoningEffort(options.effort.capitalize()))
    if options.date is not None:
        system = system.with_conversation_start_date(options.date.isoformat())
    if options.model_identity is not None:
        system = system.with_model_identity(options.model_identity)
    if options.knowledge_cutoff is not None:
        system = system.with_knowledge_cutoff(options.knowledge_cutoff)
    if "browser" in options.tools.builtin:
        system = system.with_browser_tool()
    if "python" in options.tools.builtin:
        system = system.with_python_tool()
    message = Message.from_role_and_content(Role.SYSTEM, system)
    return _text_of(message, "system", RenderOptions(conversation_has_function_tools=bool(options.tools.functions)))


def developer_text(instructions: str, tools: Tools = NO_TOOLS) -> str:
    """Return the text of a developer message: instructions, and functions as a TypeScript namespace."""
    text = _developer_form(bool(instructions) or not tools.functions, tools)
    return text.replace(_PLACEHOLDER, instructions, 1)


@functools.lru_cache(maxsize=256)
def _developer_form(has_instructions: bool, tools: Tools) -> str:
    from openai_harmony import DeveloperContent, Message, Role, ToolDescription

    content = DeveloperContent.new()
    if has_instructions:
        content = content.with_instructions(_PLACEHOLDER)
    if tools.functions:
        content = content.with_function_tools(
            [
                ToolDescription.new(
                    f.name, f.description, parameters=parse_json(f.parameters) if f.parameters else None
                )
                for f in tools.functions
            ]
        )
    return _text_of(Message.from_role_and_content(Role.DEVELOPER, content), "developer")


def instructions_of(text: str) -> str:
    """Return the instructions in a developer message's text, the inverse of `developer_text` without tools."""
    before, after = _developer_form(True, NO_TOOLS).split(_PLACEHOLDER)
    tools_start = text.find("\n\n# Tools\n\n## functions\n\nnamespace functions {")
    if text.startswith("# Tools\n\n## functions"):
        return ""
    return text[: tools_start if tools_start >= 0 else None].removeprefix(before).removesuffix(after)


def _text_of(message: Any, role: str, options: Any = None) -> str:
    encoding = harmony_encoding()
    text: str = encoding.decode(encoding.render(message, options))
    return text.removeprefix(f"<|start|>{role}<|message|>").removesuffix("<|end|>")


def _is_own(template: str, tokenizer: Tokenizer) -> bool:
    """Return whether a template writes gpt-oss's own system message: then it is gpt-oss's, whatever else differs."""
    if _OWN_SYSTEM_TEXT not in template:
        return False
    text = "".join(_pieces(template, (), PromptOptions(date=_ANY_DAY), tokenizer))
    return text == f"<|start|>system<|message|>{system_text(PromptOptions(date=_ANY_DAY))}<|end|>"


def _pieces(
    template: str, leading: Sequence[Mapping[str, Any]], options: PromptOptions, tokenizer: Tokenizer
) -> list[str]:
    """Return what a chat template writes before a first user message, cut at marks; every second piece is a mark.

    The template sees a placeholder for every content, so that no content can turn into a mark.
    """
    messages = [
        {"role": message["role"], "content": f"CONTENT{i}PLACEHOLDER" if message["content"] else ""}
        for i, message in enumerate(leading)
    ]
    functions = [function.definition() for function in options.tools.functions]
    variables: dict[str, Any] = {
        "messages": [*messages, {"role": "user", "content": "USERPLACEHOLDER"}],
        "reasoning_effort": options.effort,
        "add_generation_prompt": False,
        "tools": functions or None,
    }
    variables |= {"builtin_tools": list(options.tools.builtin)} if options.tools.builtin else {}
    variables |= {"model_identity": options.model_identity} if options.model_identity is not None else {}
    variables |= {"knowledge_cutoff": options.knowledge_cutoff} if options.knowledge_cutoff is not None else {}
    assert options.date is not None
    try:
        text = render_template(template, json.dumps(variables), options.date)
    except TemplateError as error:
        raise InputError(f"the chat template of {tokenizer.name} failed: {error}") from error
    return _before_the_user(text, tokenizer)


def _from_template(
    template: str, leading: Sequence[Mapping[str, Any]], options: PromptOptions, tokenizer: Tokenizer
) -> list[int]:
    """Return the ids of another model's preamble, with its contents in place, so that words join as in the text."""
    pieces = _pieces(template, leading, options, tokenizer)
    contents = {f"CONTENT{i}PLACEHOLDER": message["content"] for i, message in enumerate(leading)}
    for i, (placeholder, content) in enumerate(contents.items(), 1):
        if content and not any(placeholder in piece for piece in pieces):
            raise InputError(
                f"message {i}: the chat template of {tokenizer.name} leaves this {leading[i - 1]['role']} message out: "
                "join it with the one before"
            )
    _refuse_dropped_options(pieces, options, tokenizer)
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            ids.append(tokenizer.special[piece])
        elif piece:
            ids += tokenizer.encode(re.sub(r"CONTENT\d+PLACEHOLDER", lambda key: contents.get(key[0], key[0]), piece))
    return ids


def _refuse_dropped_options(pieces: Sequence[str], options: PromptOptions, tokenizer: Tokenizer) -> None:
    text = "".join(pieces)
    names = [("tool", f.name) for f in options.tools.functions]
    names += [("built-in tool", name) for name in options.tools.builtin]
    names += [("model_identity", options.model_identity)] if options.model_identity else []
    names += [("knowledge_cutoff", options.knowledge_cutoff)] if options.knowledge_cutoff else []
    if missing := [(what, name) for what, name in names if name not in text]:
        what, name = missing[0]
        raise InputError(f"the chat template of {tokenizer.name} leaves out the {what} {shown(name)}: remove it")


def _before_the_user(text: str, tokenizer: Tokenizer) -> list[str]:
    """Return a template's text up to its user message: what stands between marks, and every second one a mark."""
    marks = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    pieces = re.split(f"({marks})", text)
    user = next((i for i, piece in enumerate(pieces) if "USERPLACEHOLDER" in piece), 0)
    start = max((i for i, piece in enumerate(pieces[:user]) if piece == "<|start|>"), default=-1)
    if start < 0:
        raise InputError(
            f"the chat template of {tokenizer.name} writes no user message after <|start|>: is it gpt-oss's?"
        )
    return pieces[:start]
