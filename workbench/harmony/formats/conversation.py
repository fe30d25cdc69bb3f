"""One conversation as another program stored it, and the transcript row that it becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import InputError
from workbench.harmony.chat_messages import from_chat_messages
from workbench.harmony.messages import EFFORTS, effort_of, settled_effort, shown
from workbench.harmony.preamble import prompt_options
from workbench.harmony.tool_definitions import read_tools
from workbench.harmony.transcripts import notes_on

_LARGEST_ID = 2**31 - 1
_REASONINGS = ("verbatim", "summary", "absent")


@dataclass
class Conversation:
    """What a file holds of one conversation.

    tokens: its ids with the length of the prompt, where they were stored. notes: flags that it had already.
    """

    messages: list[Any] = field(default_factory=list)
    id: str = ""
    prompt_id: str = ""
    effort: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool | None = None
    tokens: tuple[list[int], int] | None = None
    answer: str | None = None
    correct: bool | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def transcript_row(conversation: Conversation, effort: str | None) -> dict[str, Any]:
    """Return the transcript row of a conversation. effort: of one that names none.

    Raises:
        InputError: the conversation cannot be used.
    """
    c = conversation
    row: dict[str, Any] = {"id": c.id, "prompt_id": c.prompt_id or c.id}
    about = {"complete": c.complete, "expected": c.answer, "correct": c.correct}
    if c.tokens is not None:
        stated = c.effort if c.effort not in (None, "") else effort
        _check_tokens(*c.tokens)
        row |= {"effort": effort_of(stated) if stated else None, "tokens": c.tokens[0], "n_prompt": c.tokens[1]}
        return _present(row | about | {"notes": c.notes or None, "meta": c.meta or None})
    options, notes = _options(c)
    chat = from_chat_messages(
        c.messages, builtin=options.get("builtin_tools", ()), truncated=c.complete is False, split=True
    )
    if not any(m["role"] == "assistant" for m in chat.messages):
        raise InputError("it has no message of an assistant")
    stated = settled_effort(c.effort, chat.messages) or effort
    if stated is None:
        raise InputError(f"its effort is not stated: give --effort, one of {', '.join(EFFORTS)}")
    prompt_options(effort=stated, **options)
    if c.complete is None:
        about["complete"] = chat.complete
    if any(m.get("recipient") not in (None, "all") for m in chat.messages if m["role"] == "assistant"):
        notes += [] if options.get("tools") or options.get("builtin_tools") else ["tools_not_rendered"]
    notes = [*c.notes, *notes, *notes_on(chat)]
    has_analysis = any(m.get("channel") == "analysis" for m in chat.messages)
    row_own = c.meta.get("reasoning")  # of the row, and not this conversation's reasoning
    own = {"reasoning_of_row": row_own} if row_own is not None and row_own not in _REASONINGS else {}
    meta = c.meta | own | {"reasoning": ("summary" if chat.summary else "verbatim") if has_analysis else "absent"}
    row |= {"effort": stated, "messages": chat.messages} | about | options
    return _present(row | {"notes": list(dict.fromkeys(notes)) or None, "meta": meta})


def _options(conversation: Conversation) -> tuple[dict[str, Any], list[str]]:
    """Return options of rendering without the tools that gpt-oss has no form for, and a note if there are any."""
    options = {name: value for name, value in conversation.options.items() if value not in (None, [], "")}
    tools = read_tools(options.get("tools"), options.get("builtin_tools"))
    options.pop("tools", None)
    options.pop("builtin_tools", None)
    if tools.functions:
        options["tools"] = [function.definition() for function in tools.functions]
    if tools.builtin:
        options["builtin_tools"] = list(tools.builtin)
    return options, ["tools_not_rendered"] if tools.unknown else []


def _check_tokens(ids: Sequence[Any], n_prompt: Any) -> None:
    """Check that ids are ids, of any vocabulary.

    Raises:
        InputError: one is no whole number from 0, or the prompt is not a number of them.
    """
    if not ids:
        raise InputError("it has no ids: expected at least one")
    if wrong := [id for id in ids if type(id) is not int or not 0 <= id <= _LARGEST_ID]:
        raise InputError(f"its ids hold {shown(wrong[0])}; expected whole numbers from 0 to {_LARGEST_ID:,}")
    if type(n_prompt) is not int or not 0 <= n_prompt <= len(ids):
        raise InputError(f"n_prompt is {shown(n_prompt)}; expected how many of the {len(ids)} tokens are the prompt")


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def error_text(error: BaseException) -> str:
    """Return an error in one line, a missing field by its name."""
    return f"{shown(error.args[0])} is missing" if isinstance(error, KeyError) else str(error)
