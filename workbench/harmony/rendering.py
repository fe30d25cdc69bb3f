"""Render messages as token ids.

Messages may be harmony's own or those of any chat API; see `workbench.harmony.chat_messages`. The preamble is
`workbench.harmony.preamble`'s. Everything after it is written here, by ids, so that no content can turn into a mark.
The choices where the official chat template and the harmony library differ are in docs/conversations.md.

Reference: https://cookbook.openai.com/articles/openai-harmony
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.chat_messages import from_chat_messages
from workbench.harmony.grammar import generation_prompt_ids, message_ids
from workbench.harmony.messages import EFFORTS, check_messages, leading, settled_effort
from workbench.harmony.preamble import PromptOptions, preamble, prompt_options
from workbench.harmony.vocabulary import Tokenizer

__all__ = ["EFFORTS", "render", "render_transcript", "without_earlier_analysis"]


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    builtin_tools: Sequence[str] | None = None,
    model_identity: str | None = None,
    knowledge_cutoff: str | None = None,
    date: datetime.date | str | None = None,
    tokenizer: Tokenizer,
    generation_prompt: bool = True,
) -> list[int]:
    """Return ids of a conversation at a reasoning effort, up to `<|start|>assistant` if there is a generation to come.

    effort: low, medium or high; without one, what the system text asks for, or medium. tools: definitions of functions,
    as chat completions have them. builtin_tools: browser, python or both. date: the day that the system message names;
    without one it names none, or today if the checkpoint has a chat template. The analysis of earlier turns is left
    out, as the official chat template does.

    Raises:
        InputError: the messages or options cannot be rendered.
    """
    chat = from_chat_messages(messages, builtin=builtin_tools or ())
    if chat.left_out:
        raise InputError(f"{chat.left_out[0]} cannot be rendered: remove it")
    if chat.images:
        raise InputError("gpt-oss reads no images: remove the image parts")
    options = prompt_options(
        effort=settled_effort(effort, chat.messages) or "medium",
        tools=tools,
        builtin_tools=builtin_tools,
        model_identity=model_identity,
        knowledge_cutoff=knowledge_cutoff,
        date=date,
    )
    pieces = _pieces(without_earlier_analysis(chat.messages, generation_prompt), options, tokenizer)
    if generation_prompt:
        pieces.append(generation_prompt_ids(tokenizer))
    return [id for piece in pieces for id in piece]


def render_transcript(
    messages: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer,
    effort: str | None = None,
    date: datetime.date | None = None,
    options: PromptOptions | None = None,
    complete: bool = True,
) -> tuple[list[int], int]:
    """Return ids of a conversation in harmony's own messages, and how many of them are its prompt.

    The prompt ends with the `<|start|>assistant` of the first answer to the last user message; what tools said after
    it is part of the answer. A complete answer on the final channel ends with `<|return|>`, as a model ends it; an
    answer that was cut off ends without a stop token.
    """
    options = options or prompt_options(effort=settled_effort(effort, messages) or "medium", date=date)
    messages = without_earlier_analysis(messages, generation_prompt=False)
    pieces = _pieces(messages, options, tokenizer)
    roles = [message["role"] for message in messages]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    first = next((i for i, role in enumerate(roles) if i > asked and role == "assistant"), None)
    n_prompt = sum(map(len, pieces))
    if first is not None:
        answer = len(roles) - first
        n_prompt = sum(map(len, pieces[:-answer])) + len(generation_prompt_ids(tokenizer))
    last = messages[-1]
    if last["role"] == "assistant" and last.get("raw") is None:
        if not complete:
            pieces[-1].pop()
        elif last.get("channel") == "final" and last.get("recipient") in (None, "all"):
            pieces[-1][-1] = tokenizer.mark("return")
    return [id for piece in pieces for id in piece], n_prompt


def without_earlier_analysis(
    messages: Sequence[Mapping[str, Any]], generation_prompt: bool
) -> Sequence[Mapping[str, Any]]:
    """Return the messages without the analysis that a final answer of an earlier turn has made obsolete.

    An answer belongs to an earlier turn if a user message follows it, or a new generation. The analysis between
    tool calls stays until the turn has its final answer.
    """
    turn_ends = [i for i, m in enumerate(messages) if m["role"] == "user"]
    end = len(messages) if generation_prompt else max(turn_ends, default=0)
    answered = max(
        (
            i
            for i, m in enumerate(messages[:end])
            if m["role"] == "assistant" and m.get("channel") == "final" and m.get("recipient") in (None, "all")
        ),
        default=-1,
    )
    return [m for i, m in enumerate(messages) if i > answered or m.get("channel") != "analysis"]


def _pieces(messages: Sequence[Mapping[str, Any]], options: PromptOptions, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the preamble's ids, then those of every message after it."""
    check_messages(messages)
    n_leading = leading(messages)
    if any(message.get("raw") for message in messages[:n_leading]):
        return [[], *(message_ids(message, tokenizer) for message in messages)]
    before = preamble(messages[:n_leading], options, tokenizer)
    ids: list[int] = []
    for piece in before:
        ids += [piece] if isinstance(piece, int) else message_ids({"role": piece[0], "content": piece[1]}, tokenizer)
    return [ids, *(message_ids(message, tokenizer) for message in messages[n_leading:])]
