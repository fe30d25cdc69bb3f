"""Flags of a sequence follow from its tokens and from how it was read."""

import pytest

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.flags import counted, flags_of_row, read_flags, sequence_flags
from workbench.harmony.grammar import marked_ids

WORDS = harmony.tokenizer()
ASKED = "<|start|>user<|message|>2+2<|end|>"
THOUGHT = "<|start|>assistant<|channel|>analysis<|message|>It is 4.<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>4"


def flags(text: str, **options: object) -> tuple[str, ...]:
    ids, n_prompt = marked_ids(ASKED + text, WORDS), len(marked_ids(ASKED, WORDS))
    labels = harmony.label(ids, tokenizer=WORDS, n_prompt=n_prompt)
    return sequence_flags(labels, n_prompt, **options)  # type: ignore[arg-type]


def test_a_complete_answer_with_reasoning_has_no_flag() -> None:
    assert flags(THOUGHT + ANSWER + "<|return|>") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + ANSWER, ("truncated",)),
        (ANSWER + "<|return|>", ("no_reasoning",)),
        (ANSWER, ("truncated", "no_reasoning")),
        (THOUGHT + "words without a header<|end|>" + ANSWER + "<|return|>", ("irregular",)),
    ],
)
def test_flags_follow_from_the_tokens(text: str, expected: tuple[str, ...]) -> None:
    assert flags(text) == expected


def test_what_is_known_of_the_end_decides_over_the_tokens() -> None:
    assert flags(THOUGHT + ANSWER, complete=True) == ()
    assert flags(THOUGHT + ANSWER + "<|return|>", complete=False) == ("truncated",)


def test_notes_are_flags_in_the_order_of_the_table() -> None:
    assert flags(ANSWER + "<|return|>", notes=("re_rendered", "images_left_out")) == (
        "no_reasoning",
        "images_left_out",
        "re_rendered",
    )


def test_a_row_of_messages_is_always_rendered_again() -> None:
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "channel": "final", "content": "4"}]
    assert flags_of_row({"messages": messages}) == ("no_reasoning", "re_rendered")


def test_sequences_are_counted_by_flag() -> None:
    assert counted([("truncated",), ("truncated", "irregular"), ()]) == "1 irregular, 2 truncated"
    assert counted([(), ()]) == ""


def test_an_unknown_flag_is_refused_with_the_known_ones() -> None:
    assert read_flags("irregular, truncated") == ("irregular", "truncated")
    assert read_flags(None) == ()
    with pytest.raises(InputError, match=r"--exclude long: choose from irregular, truncated"):
        read_flags("truncated,long")


def test_a_message_without_its_stop_token_is_irregular_unless_it_is_the_last() -> None:
    thought, answer = (
        "<|start|>assistant<|channel|>analysis<|message|>a",
        "<|start|>assistant<|channel|>final<|message|>b",
    )

    def flags(*raws: str) -> tuple[str, ...]:
        messages = [{"role": "assistant", "channel": "analysis", "content": "", "raw": raw} for raw in raws]
        return flags_of_row({"messages": [{"role": "user", "content": "q"}, *messages]})

    assert "irregular" in flags(thought, answer)
    assert "irregular" not in flags(f"{thought}<|end|>", answer)  # negative control
