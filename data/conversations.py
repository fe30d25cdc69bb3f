"""Problems as harmony conversations: token ids for training, and messages for prompts."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from workbench.data.tasks import Problem, draw
from workbench.data.vocabulary import ID, VOCABULARY
from workbench.harmony.rendering import EFFORTS

# Families that may come before another, as the first of two turns: short, and answered without analysis.
FIRST_TURNS = ("reverse", "recall", "sort", "count", "product")
_TOKENS = sorted((t for t in VOCABULARY if len(t) > 1), key=len, reverse=True)


class Example(NamedTuple):
    """Token ids, and for each token whether the model is trained to predict it."""

    ids: list[int]
    taught: list[bool]


def spell(text: str) -> list[int]:
    """Return the ids of a text of marks, header words and characters."""
    ids, at = [], 0
    while at < len(text):
        token = next((t for t in _TOKENS if text.startswith(t, at)), text[at])
        ids.append(ID[token])
        at += len(token)
    return ids


def _content(text: str) -> list[int]:
    return [ID[character] for character in text]


def _turn(problem: Problem, effort: str, last: bool, called: bool) -> list[tuple[list[int], bool]]:
    """Return the pieces of one question and its answer; the assistant's part of the last turn is trained.

    `called`: the calculator was called before the model's turn, as in a prompt.
    """
    pieces: list[tuple[list[int], bool]] = []

    def say(header: str, content: str, close: str, taught: bool) -> None:
        pieces.append((spell(header) + _content(content) + spell(close), taught))

    def answer(header: str, content: str, close: str, taught: bool = True) -> None:
        # A prompt ends in <|start|>assistant: after a user or a tool these two tokens are given, not taught.
        pieces.append((spell("<|start|>assistant"), pieces[-1][1]))
        say(header, content, close, taught)

    if problem.rule:
        say("<|start|>developer<|message|>", problem.rule, "<|end|>", False)
    say("<|start|>user<|message|>", problem.question, "<|end|>", False)
    analysis = {"low": "", "medium": problem.sketch, "high": problem.steps}[effort]
    if analysis and last and not called:  # harmony drops the analysis of earlier turns
        answer("<|channel|>analysis<|message|>", analysis, "<|end|>")
    if problem.call:
        answer("<|channel|>commentary to=functions.calc<|message|>", problem.call, "<|call|>", taught=not called)
        say("<|start|>functions.calc<|channel|>commentary to=assistant<|message|>", problem.answer, "<|end|>", False)
    answer("<|channel|>final<|message|>", problem.answer, "<|return|>" if last else "<|end|>")
    return [(ids, taught and last) for ids, taught in pieces]


def conversation(effort: str, problems: Sequence[Problem], *, called: bool = False) -> Example:
    """Return one or several questions in a row; only the last one has an analysis and is trained."""
    pieces = [(spell(f"<|start|>system<|message|>Reasoning: {effort}<|end|>"), False)]
    for i, problem in enumerate(problems):
        pieces += _turn(problem, effort, last=i == len(problems) - 1, called=called and bool(problem.call))
    return Example([t for ids, _ in pieces for t in ids], [taught for ids, taught in pieces for _ in ids])


def training_example(rng: random.Random) -> Example:
    """Return a random training conversation: any effort and family, a tenth with two turns, some with a tool call."""
    problems = [draw(rng)]
    if rng.random() < 0.1:
        problems.insert(0, draw(rng, rng.choice(FIRST_TURNS)))
    return conversation(rng.choice(EFFORTS), problems, called=rng.random() < 0.4)


def prompt_messages(*turns: Problem) -> list[dict[str, str]]:
    """Return the messages of a prompt: the last problem, after those that were answered before.

    The calculator has already replied, so one generation is enough.
    """
    *answered, asked = turns
    messages: list[dict[str, str]] = []
    for problem in answered:
        messages += [*_asked(problem), {"role": "assistant", "channel": "final", "content": problem.answer}]
    return messages + _asked(asked)


def _asked(problem: Problem) -> list[dict[str, str]]:
    messages = [{"role": "developer", "content": problem.rule}] if problem.rule else []
    messages.append({"role": "user", "content": problem.question})
    if problem.call:
        call = {"role": "assistant", "channel": "commentary", "recipient": "functions.calc", "content": problem.call}
        reply = {"role": "tool", "name": "functions.calc", "recipient": "assistant", "channel": "commentary"}
        text = f"<|start|>functions.calc<|channel|>commentary to=assistant<|message|>{problem.answer}<|end|>"
        messages += [call, {**reply, "content": problem.answer, "raw": text}]  # in the order that nano was trained on
    return messages
