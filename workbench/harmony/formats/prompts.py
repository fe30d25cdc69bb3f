"""Prompts of rows: messages, one text, or one text with harmony's marks that may begin the answer."""

import re
from collections.abc import Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.grammar import parse_text
from workbench.harmony.marked_text import STOPS, is_marked
from workbench.harmony.vocabulary import MARKS


def given_messages(value: Any) -> list[Any]:
    """Return the messages of a prompt, which may be one text, with marks or without.

    Raises:
        InputError: the prompt is several prompts, or ids.
    """
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        if len(value) > 1:
            raise InputError(f"the request has {len(value)} prompts: write a row for each prompt and its answer")
        value = value[0]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        raise InputError("the prompt is token ids: give them as prompt_token_ids, and those of the answer as token_ids")
    if isinstance(value, str):
        return (
            parse_text(value)
            if value.startswith("<|start|>") and is_marked(value)
            else [{"role": "user", "content": value}]
        )
    return list(value) if isinstance(value, Sequence) else []


def continued(prompt: Any, answer: str) -> tuple[Any, str]:
    """Return a prompt and its answer, where what a prompt with marks begins for the answer belongs to the answer.

    A prompt may end with `<|start|>assistant<|channel|>analysis<|message|>`.
    """
    if not isinstance(prompt, str) or not prompt.startswith("<|start|>"):
        return prompt, answer
    before, mark, opened = prompt.rpartition("<|start|>")
    if not opened.startswith("assistant") or "<|message|>" not in opened or opened.endswith(STOPS):
        return prompt, answer
    if not any(f"<|{name}|>" in answer for name in MARKS):  # the answer's marks were stripped
        opened = "".join(piece for piece in re.split(r"<\|\w+\|>", opened.removeprefix("assistant")))
        return before, opened + answer
    return before, mark + opened + answer
