"""Rows of shapes that nothing recognizes: their fields are named, or the object that holds them is a known one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import run_command
from workbench.errors import InputError
from workbench.harmony.formats.field_mapping import FieldMapping, parse_pairs
from workbench.harmony.hosts.files import convert

# the shapes of three public logs of gpt-oss-20b
LOGGED = {
    "event_type": "inference",
    "request": {"model": "gpt-oss-20b", "messages": [{"role": "user", "content": "Is this spam?"}]},
    "response": {"id": "gen-1", "content": "INVALID", "finish_reason": "stop"},
    "reasoning": "It promotes a course.",
    "expected": "INVALID",
}
EXPORT = {
    "export_id": "e1",
    "session": {"effort": "high"},
    "findings": [
        {"finding_id": "f1", "prompt": "2+2", "response": "4", "thinking": "Two and two.", "reasoning": "No exploit."},
        {"finding_id": "f2", "prompt": "3+3", "response": "6", "thinking": None},
        {"finding_id": "f3", "note": "not sent"},
    ],
}
MARKED = (
    "<|start|>system<|message|>You are ChatGPT.\n\nReasoning: medium<|end|><|start|>user<|message|>Hi<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>A greeting.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello"
)
FINDINGS = {
    "schema_version": "1.0.0",
    "issue_title": "A greeting",
    "harmony_response_walkthroughs": [MARKED + "<|return|>", MARKED + "<|end|><|start|>assistant", "prose", MARKED],
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def contents(row: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    return [(m["role"], m.get("channel"), m["content"]) for m in row["messages"]]


def test_named_fields_make_conversations_and_all_else_stays_metadata(tmp_path: Path) -> None:
    fields = {"prompt": "prompt", "response": "response", "reasoning": "thinking", "id": "finding_id"}
    mapping = FieldMapping({**fields, "effort": "/session.effort"}, rows="findings")
    _, rows, left_out = convert(write(tmp_path / "e.json", EXPORT), mapping=mapping)
    assert contents(rows[0]) == [
        ("user", None, "2+2"),
        ("assistant", "analysis", "Two and two."),
        ("assistant", "final", "4"),
    ]
    assert contents(rows[1]) == [("user", None, "3+3"), ("assistant", "final", "6")]
    assert [(row["id"], row["effort"]) for row in rows] == [("f1", "high"), ("f2", "high")]
    # another program's field of the name of a field of ours is neither read nor lost
    assert rows[0]["meta"]["reasoning_of_row"] == "No exploit."
    assert rows[0]["meta"]["document"] == {"export_id": "e1"}
    assert rows[0].get("notes") is None
    assert left_out == ["line 1, findings 3: it has no prompt (prompt); its fields are 'finding_id', 'note'"]


def test_a_path_leads_through_objects_lists_and_names_with_dots(tmp_path: Path) -> None:
    row = {"log.prompt": "2+2", "result": {"choices": [{"text": "5"}, {"text": "4"}], "seconds": 1.5}}
    mapping = FieldMapping({"prompt": "log.prompt", "response": "result.choices.1.text"})
    _, rows, left_out = convert(write(tmp_path / "r.jsonl", row), mapping=mapping, effort="low")
    assert (contents(rows[0]), left_out) == ([("user", None, "2+2"), ("assistant", "final", "4")], [])
    assert rows[0]["meta"]["result"]["seconds"] == 1.5
    missing = FieldMapping({"prompt": "log.prompt", "response": "result.choices.2.text"})
    with pytest.raises(InputError, match=r"it has no result.choices.2.text \(response\); its fields are 'log.prompt'"):
        convert(write(tmp_path / "r.jsonl", row), mapping=missing, effort="low")


def test_the_reasoning_and_the_text_of_a_response_beside_its_request_are_read(tmp_path: Path) -> None:
    _, rows, _ = convert(write(tmp_path / "l.jsonl", LOGGED), effort="low")
    assert contents(rows[0])[1:] == [
        ("assistant", "analysis", "It promotes a course."),
        ("assistant", "final", "INVALID"),
    ]
    details = {"summary": "Promotes.", "details": [{"type": "reasoning.text", "text": "It promotes a course."}]}
    _, rows, _ = convert(write(tmp_path / "l.jsonl", LOGGED | {"reasoning": details}), effort="low")
    assert contents(rows[0])[1] == ("assistant", "analysis", "It promotes a course.")
    assert rows[0]["meta"]["reasoning"] == "verbatim"
    # a negative control: the settings of a request are not reasoning
    settings = LOGGED | {"reasoning": {"effort": "high", "summary": "auto"}}
    _, rows, _ = convert(write(tmp_path / "l.jsonl", settings))
    assert contents(rows[0])[1:] == [("assistant", "final", "INVALID")]
    assert rows[0]["effort"] == "high"


def test_what_metadata_cannot_hold_is_flagged(tmp_path: Path) -> None:
    row = {"q": "2+2", "a": "4", "log": "x" * 20_000, "image": "data:image/png;base64,AA"}
    mapping = FieldMapping({"prompt": "q", "response": "a"})
    _, rows, _ = convert(write(tmp_path / "r.jsonl", row), mapping=mapping, effort="low")
    assert set(rows[0]["notes"]) == {"fields_left_out", "images_left_out"}
    assert not {"log", "image"} & {*rows[0]["meta"]}


def test_roles_of_another_program_are_named(tmp_path: Path) -> None:
    turns = [{"role": "attacker", "content": "Hi"}, {"role": "target", "content": "Hello"}]
    source = write(tmp_path / "s.json", {"attempts": [{"turns": turns}]})
    fields = {"messages": "turns"}
    _, rows, _ = convert(
        source, mapping=FieldMapping(fields, "attempts", {"attacker": "user", "target": "assistant"}), effort="low"
    )
    assert contents(rows[0]) == [("user", None, "Hi"), ("assistant", "final", "Hello")]
    # a negative control: without them, the first role that nothing names is refused
    assert "unknown role 'attacker'" in convert(source, mapping=FieldMapping(fields, "attempts"), effort="low")[2][0]


def test_an_answer_that_was_cut_off_is_truncated(tmp_path: Path) -> None:
    """By a named field, and by the choice of a prediction of EvalScope, whose messages state no reason."""
    row = {"q": "2+2", "a": {"text": "4 is", "why": "length"}}
    mapping = FieldMapping({"prompt": "q", "response": "a.text", "finish_reason": "a.why"})
    _, rows, _ = convert(write(tmp_path / "r.jsonl", row), mapping=mapping, effort="low")
    assert rows[0]["complete"] is False
    output = {"choices": [{"message": {"role": "assistant", "content": "4 is"}, "stop_reason": "max_tokens"}]}
    prediction = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4 is"}]}
    _, rows, _ = convert(write(tmp_path / "p.jsonl", prediction | {"model_output": output}), effort="low")
    assert rows[0]["complete"] is False
    _, rows, _ = convert(write(tmp_path / "p.jsonl", prediction), effort="low")
    assert rows[0].get("complete") is not False, "a negative control: without a reason, nothing states that it was cut"


def test_each_text_of_a_red_teaming_finding_is_a_conversation(tmp_path: Path) -> None:
    _, rows, left_out = convert(write(tmp_path / "f.json", FINDINGS))
    assert [contents(row)[2:] for row in rows] == [
        [("assistant", "analysis", "A greeting."), ("assistant", "final", "Hello")]
    ] * 3
    assert [row["effort"] for row in rows] == ["medium"] * 3
    # one has its stop token, one is followed by the next turn, one ends in the middle
    assert [row.get("complete") for row in rows] == [True, None, False]
    assert rows[0]["meta"]["document"]["issue_title"] == "A greeting"
    assert len(left_out) == 1
    assert left_out[0].startswith("line 1, harmony_response_walkthroughs 3: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--field", "prompt"], "--field 'prompt': expected two parts with = between them, each name once"),
        (["--field", "promt=a"], "--field promt=…: choose from messages, prompt"),
        (["--field", "prompt=a"], "--field: name the field of messages, those of prompt and response, or that of text"),
        (["--field", "text="], "--field text=: name the path of the field"),
        (["--field", "messages=a", "--role", "bot=robot"], "--role …=robot: choose from"),
        (["--role", "bot=assistant"], "--role: name the field of the messages with --field messages=PATH"),
        (["--rows", "nothing"], "it has no list nothing; its fields are 'export_id', 'session', 'findings'"),
    ],
)
def test_wrong_fields_are_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    result = run_command("convert", str(write(tmp_path / "e.json", EXPORT)), str(tmp_path / "out.jsonl"), *words)
    assert result.code == 2
    assert line in result.err
    assert result.err.count("\n") <= 2
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_takes_fields_and_rows(tmp_path: Path) -> None:
    words = ["--rows", "findings", "--effort", "low", "--field", "prompt=prompt", "--field", "response=response"]
    result = run_command("convert", str(write(tmp_path / "e.json", EXPORT)), str(tmp_path / "out.jsonl"), *words)
    assert result.code == 0, result.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert parse_pairs("--field", ["prompt=a=b"]) == {"prompt": "a=b"}
