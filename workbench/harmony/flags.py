"""What is irregular or incomplete about a sequence, and the line that counts it.

A flag is a reason to look at a sequence, or to leave it out of a study. Some follow from its tokens, others from how
it was read: a file of messages holds no ids, so these are made again, and images are left out.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.labels import CHANNELS, Labels, irregular, label
from workbench.harmony.vocabulary import tokenizer

SEQUENCE_FLAGS = {
    "irregular": "irregular",  # a message of the assistant does not follow the format
    "truncated": "truncated",  # the answer was cut off
    "no_reasoning": "without reasoning",
    "reasoning_summary": "with summarized reasoning",
    "images_left_out": "with images left out",
    "fields_left_out": "with fields left out",
    "tools_not_rendered": "with tools not rendered",
    "re_rendered": "re-rendered",  # ids made from text: not always those that the model generated
}


def sequence_flags(
    labels: Labels, n_prompt: int, *, complete: bool | None = None, notes: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return flags of a sequence, in the order of SEQUENCE_FLAGS.

    complete: whether the answer ended by itself, if that is known; otherwise the stop token shows it. notes: flags from
    reading the sequence.
    """
    answers = [m for m in labels.messages if m.role in ("assistant", "") and m.end > n_prompt]
    flags = set(notes)
    if any(irregular(m) for m in labels.messages):
        flags.add("irregular")
    cut = bool(answers) and labels.messages[-1] is answers[-1] and answers[-1].closed_by == "truncated"
    if complete is False or (complete is None and cut):
        flags.add("truncated")
    if answers and not any(m.channel == "analysis" for m in answers):
        flags.add("no_reasoning")
    return tuple(flag for flag in SEQUENCE_FLAGS if flag in flags)


def flags_of_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return flags of a transcript row of messages, before it is rendered."""
    flags = set(row.get("notes", ()))
    messages = row["messages"]
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    answer = [m for m in messages[asked + 1 :] if m["role"] == "assistant"]
    raws = [(m["raw"], m is messages[-1]) for m in answer if m.get("raw")]
    flags |= {"irregular"} if any(_is_irregular(raw, is_last=last) for raw, last in raws) else set()
    flags |= {"irregular"} if any(m.get("channel") not in (None, *CHANNELS[2:5]) for m in answer) else set()
    flags |= {"truncated"} if row.get("complete") is False else set()
    flags |= set() if any(m.get("channel") == "analysis" for m in answer) else {"no_reasoning"}
    return tuple(flag for flag in SEQUENCE_FLAGS if flag in flags | {"re_rendered"})


def _is_irregular(raw: str, *, is_last: bool) -> bool:
    """Return whether a text with marks breaks the format; only the last of a conversation may lack a stop token."""
    words = tokenizer()
    messages = label(marked_ids(raw, words), tokenizer=words, n_prompt=0).messages
    return any(irregular(m) for m in messages) or (not is_last and bool(messages) and messages[-1].stop < 0)


def counted(flags: Iterable[Iterable[str]]) -> str:
    """Return how many sequences have each flag, in words; "" if none has any."""
    counts = Counter(flag for names in flags for flag in set(names))
    return ", ".join(f"{counts[flag]:,} {words}" for flag, words in SEQUENCE_FLAGS.items() if counts[flag])


def counted_in(sequences: Any) -> str:
    """Return how many sequences of a run's table have each flag, in words; "" for runs without flags."""
    return counted(str(text).split() for text in sequences["flags"]) if "flags" in sequences else ""


def read_flags(text: str | None) -> tuple[str, ...]:
    """Return the flags that an option such as `--exclude irregular,truncated` names.

    Raises:
        InputError: a name is not one of SEQUENCE_FLAGS.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if unknown := [name for name in names if name not in SEQUENCE_FLAGS]:
        raise InputError(f"--exclude {unknown[0]}: choose from {', '.join(SEQUENCE_FLAGS)}")
    return names
