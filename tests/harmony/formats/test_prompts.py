"""Prompts of rows: one text, ids, several, and a text with marks that begins the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.formats.prompts import continued, given_messages
from workbench.harmony.hosts.files import convert

PROMPT = "<|start|>user<|message|>6*7<|end|><|start|>assistant"
OPENED = f"{PROMPT}<|channel|>analysis<|message|>"
MARKED, STRIPPED = (
    "six sevens<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>",
    "six sevensassistantfinal42",
)


def read(tmp_path: Path, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return convert(path, effort="low")[1:]


@pytest.mark.parametrize("answer", [MARKED, STRIPPED])
def test_what_a_prompt_begins_belongs_to_the_answer(answer: str, tmp_path: Path) -> None:
    (row,), _ = read(tmp_path, {"prompt": OPENED, "completion": answer})
    assert [(m.get("channel"), m["content"]) for m in row["messages"]] == [
        (None, "6*7"),
        ("analysis", "six sevens"),
        ("final", "42"),
    ]
    assert "notes" not in row


def test_a_prompt_that_begins_nothing_stays_as_it_is() -> None:
    """The negative control."""
    for prompt in (
        PROMPT,
        f"{PROMPT}<|channel|>final<|message|>42<|end|>",
        "6*7",
        [{"role": "user", "content": "6*7"}],
    ):
        assert continued(prompt, MARKED) == (prompt, MARKED)


def test_several_prompts_and_ids_are_refused_and_a_list_of_one_is_read() -> None:
    assert given_messages(["6*7"]) == given_messages("6*7") == [{"role": "user", "content": "6*7"}]
    with pytest.raises(InputError, match="the request has 2 prompts: write a row for each"):
        given_messages(["6*7", "7*6"])
    with pytest.raises(InputError, match="the prompt is token ids: give them as prompt_token_ids"):
        given_messages([200006, 1428])


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
def test_a_request_that_continues_another_is_refused(name: str, tmp_path: Path) -> None:
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}]
    row = {"request": {"input": "6*7", name: "resp_1"}, "response": {"output": output, "status": "completed"}}
    rows, (reason,) = read(tmp_path, row)
    assert not rows
    assert f"continues 'resp_1' ({name}), whose messages it does not hold: give all messages" in reason
    del row["request"][name]
    assert len(read(tmp_path, row)[0]) == 1  # negative control


@pytest.mark.parametrize(
    ("row", "complete"),
    [
        ({"text": f"{PROMPT}<|channel|>final<|message|>42<|return|>"}, True),
        ({"text": f"{PROMPT}<|channel|>final<|message|>42"}, False),
        ({"prompt": PROMPT, "content": "<|channel|>final<|message|>42", "stop": True, "stop_type": "eos"}, True),
        ({"prompt": PROMPT, "content": "<|channel|>final<|message|>42", "stop": True, "stop_type": "limit"}, False),
        ({"prompt": "6*7", "response": "42", "context": [1, 2], "done": True, "done_reason": "stop"}, True),
    ],
)
def test_texts_with_marks_and_responses_of_local_servers_are_read(
    row: dict[str, Any], complete: bool, tmp_path: Path
) -> None:
    (converted,), left_out = read(tmp_path, row)
    assert [m["content"] for m in converted["messages"]] == ["6*7", "42"]
    assert (converted["complete"], left_out) == (complete, [])


def test_pieces_of_a_stream_and_empty_outputs_are_named(tmp_path: Path) -> None:
    request = {"messages": [{"role": "user", "content": "6*7"}]}
    piece = {"choices": [{"index": 0, "delta": {"content": "42"}}]}
    assert "a piece of a streamed response" in read(tmp_path, {"request": request, "response": piece})[1][0]
    empty = {"output": [], "status": "failed"}
    assert "no output; its status is 'failed'" in read(tmp_path, {"request": request, "response": empty})[1][0]
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}]
    for status, complete in (("in_progress", False), ("failed", False), ("completed", True)):
        response = {"output": output, "status": status}
        assert read(tmp_path, {"request": request, "response": response})[0][0]["complete"] is complete, status


def test_scores_of_given_answers_are_no_answers(tmp_path: Path) -> None:
    sample = {"doc_id": 0, "target": "4", "arguments": [["2+2=", " 4"], ["2+2=", " 5"]], "acc": 1.0}
    rows, (reason,) = read(tmp_path, sample | {"resps": [[["-1.0", "True"]], [["-2.0", "False"]]]})
    assert (rows, "scores the log-likelihood of given answers" in reason) == ([], True)
    generated = sample | {"arguments": [["2+2=", {"until": []}]], "resps": [["4"]]}
    assert len(read(tmp_path, generated)[0]) == 1  # negative control


CHAT = {"choices": [{"message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"custom_id": "a", "response": None, "error": {"code": "expired"}},
            "the request 'a' failed: {'code': 'expired'}",
        ),
        ({"custom_id": "a", "response": {"body": {"error": "busy"}}}, "the request 'a' failed: 'busy'"),
        ({"custom_id": "b", "response": {"body": CHAT}}, "has none of the custom_id 'b': give the file of this batch"),
    ],
)
def test_why_a_response_of_a_batch_is_left_out_is_stated(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    asked = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "6*7"}]}}
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps(asked))
    responses = [row, {"custom_id": "a", "response": {"body": CHAT}}]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, responses)))
    _, rows, left_out = convert(tmp_path / "responses.jsonl", effort="low", requests=requests)
    assert reason in left_out[0]
    assert [row["id"] for row in rows] == ["a"]  # negative control
    requests.write_text(f"{json.dumps(asked)}\n{json.dumps(asked)}")
    with pytest.raises(InputError, match="line 2: the custom_id 'a' is that of an earlier request"):
        convert(tmp_path / "responses.jsonl", effort="low", requests=requests)


@pytest.mark.parametrize("ids", [[], [1, 2**31]])
def test_ids_that_no_vocabulary_has_are_left_out(ids: list[int], tmp_path: Path) -> None:
    assert read(tmp_path, {"tokens": ids, "n_prompt": 0})[0] == []
    assert len(read(tmp_path, {"tokens": [1, 2**31 - 1], "n_prompt": 0})[0]) == 1  # negative control
