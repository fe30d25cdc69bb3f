"""What rows have beside their conversation: read, kept in the metadata, flagged or refused, never dropped."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench.errors import InputError
from workbench.harmony.formats.row_fields import about, decoded, one_effort, with_reasoning, with_system
from workbench.harmony.hosts.files import convert

ASK, ANSWER = {"role": "user", "content": "6*7"}, {"role": "assistant", "content": "42"}
CHAT = {"choices": [{"message": ANSWER, "finish_reason": "stop"}]}
ROWS: dict[str, dict[str, Any]] = {
    "chat messages": {"messages": [ASK, ANSWER]},
    "prompts with answers": {"prompt": "6*7", "response": "42"},
    "ShareGPT conversations": {"conversations": [{"from": "human", "value": "6*7"}, {"from": "gpt", "value": "42"}]},
    "TRL prompts with completions": {"prompt": [ASK], "completion": [ANSWER]},
    "requests with responses": {"request": {"messages": [ASK]}, "response": CHAT},
}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return convert(path, effort="low", **options)[1:]


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_beside_the_conversation_is_its_first_message(shape: str, name: str, tmp_path: Path) -> None:
    row = ROWS[shape]
    given = {"request": {**row["request"], name: "Be brief."}} if "request" in row else {name: "Be brief."}
    (read_row,), left_out = read(tmp_path, row | given)
    assert not left_out
    assert [(m["role"], m["content"]) for m in read_row["messages"][:2]] == [("system", "Be brief."), ("user", "6*7")]
    assert read(tmp_path, row)[0][0]["messages"][0]["role"] == "user", "a negative control: without one there is none"


def test_two_system_texts_are_refused_and_the_same_twice_is_one() -> None:
    message = {"role": "system", "content": "A"}
    assert with_system({"system": "A"}, [message, ASK]) == [message, ASK]
    with pytest.raises(InputError, match="two different system texts"):
        with_system({"system": "B"}, [message, ASK])
    with pytest.raises(InputError, match="system is 5; expected text"):
        with_system({"system": 5}, [ASK])


@pytest.mark.parametrize("shape", ["chat messages", "prompts with answers", "ShareGPT conversations"])
def test_what_no_format_reads_is_in_the_metadata(shape: str, tmp_path: Path) -> None:
    more = {"score": 0.3, "tags": ["a"], "correct": "yes", "meta": {"task": "sums", "score": 1}, "metadata": {"b": 2}}
    (row,), _ = read(tmp_path, ROWS[shape] | more)
    assert row["meta"].items() >= {"score": 1, "tags": ["a"], "correct": "yes", "task": "sums", "b": 2}.items()
    assert "notes" not in row
    assert "correct" not in row


def test_what_metadata_cannot_hold_is_flagged(tmp_path: Path) -> None:
    assert read(tmp_path, ROWS["chat messages"] | {"log": "x" * 20_000})[0][0]["notes"] == ["fields_left_out"]
    assert read(tmp_path, ROWS["chat messages"] | {"image": "a.png"})[0][0]["notes"] == ["images_left_out"]
    path = tmp_path / "rows.parquet"
    day = datetime.date(2025, 8, 5)
    pq.write_table(pa.Table.from_pylist([ROWS["chat messages"] | {"day": day, "blob": b"\0"}]), path)
    (row,) = convert(path, effort="low")[1]
    assert (row["meta"]["day"], row["notes"]) == ("2025-08-05", ["fields_left_out"])


def test_a_file_that_was_converted_is_read_again_without_a_loss(tmp_path: Path) -> None:
    about_row = {"id": "a", "prompt_id": "p", "expected": "42", "correct": True, "complete": True}
    first, _ = read(tmp_path, ROWS["chat messages"] | about_row | {"image": "a.png", "score": 0.3})
    again, left_out = read(tmp_path, *first)
    assert (again, left_out) == (first, [])
    assert first[0].items() >= about_row.items()
    tokens = about_row | {"effort": "high", "tokens": [1, 2], "n_prompt": 1, "notes": ["irregular"], "meta": {"a": 1}}
    assert read(tmp_path, tokens)[0] == [tokens]


def test_rows_with_an_empty_id_are_prompts_of_their_own(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, *[ROWS["chat messages"] | {"id": None, "prompt_id": None}] * 2)
    assert [(row["id"], row["prompt_id"]) for row in rows] == [("1", "1"), ("2", "2")]
    assert read(tmp_path, ROWS["chat messages"] | {"id": 0})[0][0]["id"] == "0"


def test_two_efforts_are_refused_and_that_of_a_response_counts(tmp_path: Path) -> None:
    assert one_effort({"effort": "High", "reasoning_effort": "high"}, {"think": "HIGH"}) == "High"
    with pytest.raises(InputError, match="it names the efforts high and low"):
        about({"effort": "low", "reasoning": {"effort": "high"}})
    response = {"output": [{"type": "message", **ANSWER}], "reasoning": {"effort": "high"}, "status": "completed"}
    (row,), _ = read(tmp_path, {"request": {"input": "6*7"}, "response": response})
    assert row["effort"] == "high"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two answers": ({"prompt": "6*7", "answer": "42", "response": "41"}, "nothing shows which one the model wrote"),
    "an input": ({"prompt": "Multiply.", "input": "6*7", "output": "42"}, "it has a prompt and input"),
    "complete as text": (ROWS["chat messages"] | {"complete": "false"}, "complete is 'false'; expected true, false"),
    "truncated as number": (ROWS["chat messages"] | {"truncated": 1}, "truncated is 1; expected true, false or null"),
    "tokens and messages": ({"tokens": [1], "n_prompt": 0, "messages": [ASK, ANSWER]}, "both tokens and messages"),
    "half a prompt": ({"tokens": [1, 2], "n_prompt": 1.5}, "n_prompt is 1.5; expected how many of the 2"),
    "fractions as ids": ({"tokens": [1.0, 2], "n_prompt": 1}, "its ids hold 1.0; expected whole numbers"),
    "metadata of other conversations": (
        {"convos": [[ASK, ANSWER]] * 2, "metadata": {"example_level_metadata": [{"score": 1}]}},
        "2 convos, and example_level_metadata of 1 examples",
    ),
    "one name twice": ({}, "an object has the name 'content' twice"),
}


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_be_read_in_two_ways_is_left_out_with_the_reason(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    twice = '{"messages": [{"role": "user", "content": "6*7"}, {"role": "assistant", "content": "1", "content": "2"}]}'
    path.write_text(json.dumps(ROWS["chat messages"]) + "\n" + (json.dumps(row) if row else twice))
    _, rows, left_out = convert(path, effort="low")
    assert len(rows) == 1, "a negative control: the row beside it is read"
    assert len(left_out) == 1
    assert reason in left_out[0]


def test_every_response_of_a_sample_is_read(tmp_path: Path) -> None:
    sample = {"doc_id": 3, "arguments": [["6*7", {}]], "resps": [["42", "41"]], "exact_match": 1.0}
    rows, _ = read(tmp_path, sample)
    assert [(r["id"], r["messages"][-1]["content"], "correct" in r) for r in rows] == [
        ("3/0", "42", False),
        ("3/1", "41", False),
    ]
    (row,), _ = read(tmp_path, sample | {"resps": [["42"]]})
    assert row["correct"] is True, "a negative control: the score of one response is its own"
    assert "correct" not in read(tmp_path, sample | {"resps": [["42"]], "acc": 0})[0][0]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "chain_of_thought"])
@pytest.mark.parametrize("shape", ["chat messages", "ShareGPT conversations"])
def test_reasoning_beside_the_messages_is_that_of_the_last_answer(shape: str, name: str, tmp_path: Path) -> None:
    (row,), _ = read(tmp_path, ROWS[shape] | {name: "six sevens"})
    assert [m.get("channel") for m in row["messages"]] == [None, "analysis", "final"]
    assert row["messages"][1]["content"] == "six sevens"
    assert row["meta"]["reasoning"] == "verbatim"
    assert read(tmp_path, ROWS[shape])[0][0]["meta"]["reasoning"] == "absent"  # negative control


def test_another_reasoning_than_the_answer_has_stays_in_the_metadata(tmp_path: Path) -> None:
    messages = [ASK, {**ANSWER, "thinking": "six sevens"}]
    (row,), _ = read(tmp_path, {"messages": messages, "reasoning": "the judge's"})
    assert row["messages"][1]["content"] == "six sevens"
    assert row["meta"] == {"reasoning": "verbatim", "reasoning_of_row": "the judge's"}
    tagged = [ASK, {**ANSWER, "content": "<think>six sevens</think>42"}]
    assert with_reasoning({"reasoning": "the judge's"}, tagged) == (tagged, [])
    assert with_reasoning({"reasoning": {"effort": "low"}}, [ASK, ANSWER]) == ([ASK, ANSWER], [])


def test_reasoning_beside_the_message_of_a_choice_is_read(tmp_path: Path) -> None:
    choice = {"message": ANSWER, "finish_reason": "stop", "reasoning": "six sevens"}
    (row,), _ = read(tmp_path, {"request": {"messages": [ASK]}, "response": {"choices": [choice]}})
    assert [m.get("channel") for m in row["messages"]] == [None, "analysis", "final"]


def test_conversations_that_a_table_keeps_as_texts_are_read(tmp_path: Path) -> None:
    pair = {"request": {"messages": [ASK]}, "response": CHAT}
    texts = [{"messages": json.dumps([ASK, ANSWER])}, {name: json.dumps(value) for name, value in pair.items()}]
    rows, left_out = read(tmp_path, *texts, {"conversation": [ASK, ANSWER]})
    assert [[m["content"] for m in row["messages"]] for row in rows] == [["6*7", "42"]] * 3
    assert not left_out
    for row in ({"prompt": "an object", "response": '{"a": 1}'}, {"messages": "[Hello"}, [ASK]):  # negative controls
        assert decoded(row) == row
