"""Labels: the library's parser agrees on well-formed streams, and malformed ones never hurt."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8
from openai_harmony import StreamableParser, StreamState

from tests.harmony.malformed_streams import GOOD, MALFORMED
from workbench import harmony
from workbench.harmony.labels import CHANNELS, FLAGS, PARTS, ROLES, Labels, channel_codes, irregular, label, role_codes
from workbench.harmony.rendering import render_transcript
from workbench.harmony.vocabulary import MARKS, Tokenizer, harmony_encoding

Make = Callable[[int], list[dict[str, Any]]]
HEADER = ("role", "channel_mark", "channel", "constrain_mark", "constrain")


def stream(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which marks are marks."""
    names = sorted(tokenizer.special, key=len, reverse=True)
    ids: list[int] = []
    while text:
        name = next((name for name in names if text.startswith(name)), None)
        if name is not None:
            ids.append(tokenizer.special[name])
            text = text.removeprefix(name)
        else:
            end = min((text.find(name) for name in names if name in text), default=len(text))
            ids += tokenizer.encode(text[:end])
            text = text[end:]
    return ids


def parts_of(labels: Labels) -> list[str]:
    return [PARTS[part] for part in labels.part]


def parsable(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the names of users: the library writes `user:alice` and cannot read it."""
    return [{k: v for k, v in m.items() if k != "name" or m["role"] == "tool"} for m in messages]


def disagreements(ids: list[int], labels: Labels) -> list[str]:
    """Where the library's parser, fed token by token, sees something else."""
    parser = StreamableParser(harmony_encoding(), None)
    lines: list[str] = []
    before = parser.state
    for at, (id, part) in enumerate(zip(ids, parts_of(labels), strict=True)):
        parser.process(id)
        after = parser.state
        expected: tuple[str, ...] = HEADER
        if before == StreamState.EXPECT_START:
            expected = ("start",)
        elif before == StreamState.HEADER and after == StreamState.CONTENT:
            expected = ("message_mark",)
        elif before == StreamState.CONTENT:
            expected = ("content",) if after == StreamState.CONTENT else ("stop",)
        if part not in expected:
            lines.append(f"token {at} is {part}, expected {expected}")
        message = labels.messages[labels.message[at]] if labels.message[at] >= 0 else None
        if part == "content" and message is not None:
            role = parser.current_role
            ours = (message.role, message.channel or None, message.recipient or None)
            theirs = (role.value if role else None, parser.current_channel, parser.current_recipient)
            if ours != theirs:
                lines.append(f"token {at}: {ours}, expected {theirs}")
        before = after
    texts = [harmony_encoding().decode(ids[m.content : m.stop]) for m in labels.messages if m.stop >= 0]
    parsed = parser.messages
    if texts != ["".join(getattr(c, "text", "") for c in m.content) for m in parsed]:
        lines.append("other contents")
    ours = [(m.role, m.author or None, m.content_type or None) for m in labels.messages if m.stop >= 0]
    if ours != [(m.author.role.value, m.author.name, m.content_type) for m in parsed]:
        lines.append(f"other headers: {ours}")
    return lines


def test_the_librarys_parser_agrees_on_every_token(o200k: Tokenizer, conversation: Make) -> None:
    rng = np.random.default_rng(0)
    for seed in range(120):
        ids, _ = render_transcript(parsable(conversation(seed)), effort="medium", tokenizer=o200k)
        if seed % 3 == 0:  # cut anywhere
            ids = ids[: rng.integers(1, len(ids))]
        assert disagreements(ids, label(ids, tokenizer=o200k)) == [], conversation(seed)


def content_late(labels: Labels) -> Labels:
    return Labels(labels.message, np.roll(labels.part, 1), labels.messages)


def role_words_are_content(labels: Labels) -> Labels:
    part = np.where(labels.part == PARTS.index("role"), PARTS.index("content"), labels.part).astype(np.uint8)
    return Labels(labels.message, part, labels.messages)


def channel_of_the_message_before(labels: Labels) -> Labels:
    messages = [harmony.Message(m.start) for m in labels.messages]
    for wrong, message, before in zip(messages, labels.messages, [labels.messages[0], *labels.messages], strict=False):
        for name in message.__slots__:
            setattr(wrong, name, getattr(before if name == "channel" else message, name))
    return Labels(labels.message, labels.part, messages)


@pytest.mark.parametrize("twin", [content_late, role_words_are_content, channel_of_the_message_before])
def test_the_parser_finds_what_is_broken(
    twin: Callable[[Labels], Labels], o200k: Tokenizer, conversation: Make
) -> None:
    for seed in range(10):
        ids, n_prompt = render_transcript(parsable(conversation(seed)), effort="medium", tokenizer=o200k)
        if n_prompt < len(ids):
            assert disagreements(ids, twin(label(ids, tokenizer=o200k)))


def test_every_part_of_a_tool_call(o200k: Tokenizer) -> None:
    text = "<|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>"
    ids = stream(text, o200k)
    labels = label(ids, tokenizer=o200k)
    n = {part: parts_of(labels).count(part) for part in PARTS}
    words = len(o200k.encode("commentary")) + len(o200k.encode(" to=functions.x "))
    assert n == {
        "outside": 0,
        "start": 1,
        "role": 1,
        "channel_mark": 1,
        "channel": words,
        "constrain_mark": 1,
        "constrain": 1,
        "message_mark": 1,
        "content": 1,
        "stop": 1,
    }
    (message,) = labels.messages
    assert (message.role, message.channel, message.recipient) == ("assistant", "commentary", "functions.x")
    assert (message.content_type, message.closed_by, message.flags) == ("<|constrain|>json", "call", ())
    assert (message.start, message.content, message.stop, message.end) == (0, len(ids) - 2, len(ids) - 1, len(ids))


@pytest.mark.parametrize(("text", "expected"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_streams(text: str, expected: list[dict[str, Any]], small: Tokenizer) -> None:
    ids = stream(text, small)
    labels = label(ids, tokenizer=small)
    assert len(labels.messages) == len(expected)
    for message, fields in zip(labels.messages, expected, strict=True):
        assert {name: getattr(message, name) for name in fields} == fields
    assert_sound(ids, labels, small)


def assert_sound(ids: list[int], labels: Labels, tokenizer: Tokenizer) -> None:
    """What holds of the labels of any stream."""
    assert labels.message.shape == labels.part.shape == (len(ids),)
    assert (labels.message.dtype, labels.part.dtype) == (np.int32, np.uint8)
    assert ((labels.part == PARTS.index("outside")) == (labels.message < 0)).all()
    for i, m in enumerate(labels.messages):
        assert labels.message.tolist().count(i) == m.end - m.start
        assert (labels.message[m.start : m.end] == i).all()
        assert ids[m.start] == tokenizer.mark("start") or "no_start" in m.flags
        assert m.role in ("", *ROLES)
        assert (m.stop >= 0) == (m.closed_by in ("end", "return", "call"))
        content = np.flatnonzero(labels.part[m.start : m.end] == PARTS.index("content")) + m.start
        end = m.end if m.stop < 0 else m.stop
        assert content.tolist() == (list(range(m.content, end)) if m.content >= 0 else [])
        assert m.content >= 0 or not (m.channel or m.recipient or m.content_type)
    starts = [at for at, id in enumerate(ids) if id == tokenizer.mark("start")]
    assert [m.start for m in labels.messages if "no_start" not in m.flags] == starts
    assert set().union(*(m.flags for m in labels.messages)) <= FLAGS.keys()


@pytest.mark.parametrize("twin", [content_late, role_words_are_content])
def test_soundness_is_no_empty_word(twin: Callable[[Labels], Labels], small: Tokenizer) -> None:
    ids = stream(GOOD + "a" + GOOD, small)
    with pytest.raises(AssertionError):
        assert_sound(ids, twin(label(ids, tokenizer=small)), small)


RECORDED = json.loads((Path(__file__).parent / "recorded_streams.json").read_text())


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["source"].split(",")[0])
def test_the_library_agrees_on_recorded_streams(recorded: dict[str, Any], o200k: Tokenizer) -> None:
    """What gpt-oss generated in other programs, and the library's own test data, as ids; each names its source."""
    ids = [o200k.mark("start"), *o200k.encode("assistant"), *recorded["tokens"]]
    labels = label(ids, tokenizer=o200k, n_prompt=2)
    assert disagreements(ids, labels) == []
    assert not any(irregular(m) for m in labels.messages)
    assert disagreements(ids, label([*ids[1:], ids[0]], tokenizer=o200k))  # negative control: labels of other tokens


def test_40_000_malformed_streams(small: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    marks = [small.mark(mark) for mark in MARKS]
    likely = [*marks * 3, *small.special.values(), *small.encode("assistantusersystemanalysisfinal to=ab: ")]
    never = [-1, small.d_vocab, 10**12, -(2**40)]
    choices = np.array([*likely * 3, *never])
    for n in rng.integers(0, 24, 40_000):
        ids = rng.choice(choices, n).tolist()
        labels = label(ids, tokenizer=small)
        assert_sound(ids, labels, small)
        channel_codes(labels), role_codes(labels)
        cut = int(rng.integers(0, n + 1))
        before = label(ids[:cut], tokenizer=small)
        assert (before.message == labels.message[:cut]).all()
        sure = [m.closed_by != "truncated" or (m.content >= 0 and "no_message" not in m.flags) for m in before.messages]
        sure_tokens = np.array([*sure, True])[before.message]
        assert (before.part == labels.part[:cut])[sure_tokens].all()
        closed = [m for m in before.messages if m.closed_by != "truncated"]
        assert closed == labels.messages[: len(closed)]
        for open_, later in zip(before.messages[len(closed) :], labels.messages[len(closed) :], strict=False):
            assert (
                open_.content < 0
                or "no_message" in open_.flags
                or (open_.role, open_.channel) == (later.role, later.channel)
            )


def test_ids_may_be_any_array(small: Tokenizer) -> None:
    ids = stream(GOOD, small)
    for dtype in (np.int32, np.int64, np.uint16):
        assert label(np.array(ids, dtype=dtype), tokenizer=small).messages == label(ids, tokenizer=small).messages


def test_channels_are_those_of_content_tokens(small: Tokenizer) -> None:
    text = (
        GOOD + "<|start|>assistant<|channel|>analysis<|message|>ab<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.calc<|message|>ab<|call|>"
        "<|start|>functions.calc<|channel|>commentary<|message|>a<|end|> "
        "<|start|>assistant<|message|>a<|end|><|start|>assistant<|channel|>thoughts<|message|>a<|end|>"
        "<|start|>assistant<|channel|>final<|message|>abc<|return|>"
    )
    ids = stream(text, small)
    labels = label(ids, tokenizer=small)
    codes = channel_codes(labels)
    tokens = {name: int((codes == i).sum()) for i, name in enumerate(CHANNELS)}
    content = {"prompt": 2, "analysis": 2, "commentary": 2, "final": 3, "other": 2}
    assert tokens == {"frame": len(ids) - 11, **content}
    assert ((codes == 0) == (labels.part != PARTS.index("content"))).all()

    roles = role_codes(labels)
    assert {ROLES[i] for i in set(roles.tolist()) - {-1}} == {"user", "assistant", "tool"}
    assert ((roles == -1) == (labels.part == PARTS.index("outside"))).all()
    assert (codes.dtype, roles.dtype) == (np.uint8, np.int8)


IN_OUTPUT = {
    "a user that the model made up": ("<|start|>user<|message|>b<|end|>", ("assistant", "user", ("irregular_role",))),
    "a tool that nobody called": ("<|start|>calc<|message|>b<|end|>", ("assistant", "calc", ("irregular_role",))),
    "the next turn": ("<|return|><|start|>user<|message|>b<|end|>", ("user", "", ())),
    "a tool that was called": (
        "<|start|>assistant to=functions.calc<|message|>a<|end|><|start|>functions.calc<|message|>b<|end|>",
        ("tool", "functions.calc", ()),
    ),
}


@pytest.mark.parametrize(("output", "last"), IN_OUTPUT.values(), ids=IN_OUTPUT.keys())
def test_what_a_model_writes_is_the_assistants(output: str, last: tuple[Any, ...], small: Tokenizer) -> None:
    first = "<|start|>assistant<|channel|>final<|message|>ab"
    end = "" if output.startswith("<|return|>") else "<|end|>"
    ids = stream(GOOD + first + end + output, small)
    n_prompt = len(stream(GOOD + "<|start|>assistant", small))
    message = label(ids, tokenizer=small, n_prompt=n_prompt).messages[-1]
    assert (message.role, message.author, message.flags) == last
    assert label(ids, tokenizer=small, n_prompt=len(ids)).messages[-1].role != "assistant"  # all of it is a prompt
    assert irregular(message) == bool(message.flags)


def test_generated_text_without_a_message_is_output(small: Tokenizer) -> None:
    ids = stream("ab <|end|>", small)
    assert label(ids, tokenizer=small).messages == []
    (message,) = label(ids, tokenizer=small, n_prompt=1).messages
    assert (message.start, message.content, message.end, message.role) == (1, 1, 4, "assistant")


def test_a_header_that_was_cut_off_is_not_irregular(small: Tokenizer) -> None:
    for text in (
        "<|start|>",
        "<|start|>assistant",
        "<|start|>assistant<|channel|>comm",
        "<|start|>assistant<|channel|>commentary to=f",
    ):
        assert not irregular(label(stream(text, small), tokenizer=small).messages[0]) or text == "<|start|>"


def test_a_stream_of_no_tokens(small: Tokenizer) -> None:
    labels = label([], tokenizer=small)
    codes: UInt8[np.ndarray, " tokens"] = channel_codes(labels)
    assert codes.shape == role_codes(labels).shape == (0,)
    assert labels.messages == []


def test_vocabularies_give_a_conversation_the_same_messages(
    o200k: Tokenizer, byte: Tokenizer, conversation: Make
) -> None:
    def told(tokenizer: Tokenizer, seed: int) -> list[tuple[str, ...]]:
        ids, _ = render_transcript(conversation(seed)[1:] or conversation(0), effort="low", tokenizer=tokenizer)
        messages = label(ids, tokenizer=tokenizer).messages[1:]
        return [(m.role, m.author, m.channel, m.recipient, m.content_type, m.closed_by, *m.flags) for m in messages]

    assert all(told(o200k, seed) == told(byte, seed) for seed in range(30))


def test_the_time_of_labels_is_linear_in_the_tokens(o200k: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    ids: list[int] = []
    while len(ids) < 1_000_000:
        channel = rng.choice(["analysis", "final", "commentary"])
        ids += stream(f"<|start|>assistant<|channel|>{channel}<|message|>", o200k)
        ids += rng.integers(0, 199_998, rng.integers(20, 400)).tolist()
        ids.append(o200k.mark("end"))
    spent = []
    for n in (250_000, 1_000_000):
        array = np.array(ids[:n], dtype=np.int32)
        times = []
        for _ in range(3):
            start = time.process_time()
            label(array, tokenizer=o200k)
            times.append(time.process_time() - start)
        spent.append(min(times))
    assert spent[1] < 10 * spent[0], "four times as many tokens: a quadratic loop would take 16 times as long"
