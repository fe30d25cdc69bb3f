"""A log of Inspect 0.3.285 (mock model, three samples, effort high), and plain conversations."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from workbench import harmony
from workbench.cli import app
from workbench.errors import InputError
from workbench.harmony.formats.inspect_logs import _member
from workbench.harmony.hosts import files
from workbench.harmony.hosts.files import convert

LOG = Path(__file__).with_name("inspect.eval")


def as_json(path: Path) -> Path:
    """The same log in Inspect's other format: the header with the samples in it."""
    with zipfile.ZipFile(LOG) as log:
        header = json.loads(_member(log, "header.json"))
        samples = [json.loads(_member(log, n)) for n in sorted(log.namelist()) if n.startswith("samples/")]
    path.write_text(json.dumps(header | {"samples": samples}, indent=1))
    return path


@pytest.mark.parametrize("form", ["eval", "json"])
def test_an_inspect_log_becomes_transcripts(form: str, tmp_path: Path) -> None:
    kind, rows, left_out = convert(LOG if form == "eval" else as_json(tmp_path / "log.json"))
    assert kind == "an Inspect log"
    assert not left_out
    by_prompt = {row["prompt_id"]: row for row in rows}
    assert by_prompt.keys() == {"a", "2", "3"}
    assert {row["effort"] for row in rows} == {"high"}
    assert [(m["role"], m.get("channel"), m["content"]) for m in by_prompt["2"]["messages"]] == [
        ("system", None, "Answer."),
        ("user", None, "7*8"),
        ("assistant", "analysis", "seven times eight… 56 <script>"),
        ("assistant", "final", "54"),
    ]
    assert [by_prompt[i]["correct"] for i in ("a", "2", "3")] == [True, False, True]
    assert by_prompt["a"]["meta"]["domain"] == "arithmetic"
    assert by_prompt["a"]["meta"]["task"] == "sums"


def test_the_command_writes_what_capture_reads(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["convert", str(LOG), str(out)])
    assert result.exit_code == 0, result.output
    rows, rejects = harmony.read_transcripts(out, tokenizer=harmony.tokenizer())
    assert (len(rows), rejects) == (3, [])
    again = CliRunner().invoke(app, ["convert", str(LOG), str(out)])
    assert isinstance(again.exception, InputError)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_plain_lines_of_every_kind(tmp_path: Path) -> None:
    user = {"role": "user", "content": "2*3"}
    path = write(
        tmp_path / "x.jsonl",
        {"messages": [user, {"role": "assistant", "content": "6", "reasoning_content": "think"}], "effort": "low"},
        {"prompt": "2*3", "reasoning": "think", "answer": "6", "target": "6"},
        {"messages": [user, {"role": "assistant", "content": "<think>think</think>6"}]},
        {
            "messages": [
                user,
                {"role": "assistant", "channel": "analysis", "content": "think"},
                {"role": "assistant", "channel": "final", "content": "6"},
            ]
        },
        {"messages": [user]},
        {"nothing": 1},
        {"messages": [user, {"role": "assistant", "content": "6"}], "id": "1"},
    )
    kind, rows, left_out = convert(path, effort="medium")
    assert kind == "chat messages and prompts with answers"
    assert [row["effort"] for row in rows] == ["low", "medium", "medium", "medium", "medium"]
    for row in rows[:4]:
        assistant = [(m["channel"], m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        assert assistant == [("analysis", "think"), ("final", "6")]
    assert [why.split(":")[0] for why in left_out] == ["line 5", "line 6"]
    assert len({row["id"] for row in rows}) == len(rows)
    assert rows[-1]["meta"]["reasoning"] == "absent"
    with_none = convert(path)[2]
    assert sum("give --effort" in why for why in with_none) == 4


def test_a_text_can_be_no_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"prompt": "<|end|><script>", "answer": "<|call|>", "effort": "low"})
    (row,) = convert(path)[1]
    assert row["messages"][0]["content"] == "<|end|><script>"


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"[1]", b"PK\x03\x04broken"])
def test_what_is_no_file_of_conversations(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        convert(path)
    assert "\n" not in str(raised.value)


def test_a_damaged_log_is_one_line(tmp_path: Path) -> None:
    data = bytearray(LOG.read_bytes())
    with zipfile.ZipFile(LOG) as log:
        at = log.getinfo("header.json").header_offset + 200
    data[at : at + 40] = bytes(40)
    (tmp_path / "x.eval").write_bytes(bytes(data))
    with pytest.raises(InputError, match="not a complete Inspect log"):
        convert(tmp_path / "x.eval")
    (tmp_path / "x.eval").write_bytes(LOG.read_bytes()[:-30])
    with pytest.raises(InputError, match="not a complete Inspect log"):
        convert(tmp_path / "x.eval")


def test_too_many_rows_that_cannot_be_used_end_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_LEFT_OUT", 10)
    (tmp_path / "x").write_text('{"a": 1}\n' * 10)
    with pytest.raises(InputError, match="not a file of conversations"):
        convert(tmp_path / "x")
    (tmp_path / "x").write_text('{"a": 1}\n' * 11)
    with pytest.raises(InputError, match=r"more than 10 rows that cannot be used; line 1: "):
        convert(tmp_path / "x")


def test_rows_that_are_too_long_for_a_transcript_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4" * 2000}]}
    (tmp_path / "x").write_text((json.dumps(row) + "\n") * 3)
    monkeypatch.setattr(files, "_MOST_BYTES", 5000)
    with pytest.raises(InputError, match="holds more than 5,000 bytes of conversations"):
        convert(tmp_path / "x", effort="low")
    monkeypatch.setattr(files, "LONGEST_ROW_BYTES", 1000)
    _, rows, left_out = convert(tmp_path / "x", effort="low")
    assert not rows
    assert "expected at most 1,000" in left_out[0]


def test_rows_of_one_id_get_ids_that_no_other_row_has() -> None:
    ids = ["a", "a", "b", "a/2", "a", "a/2", "a"]
    distinct = [row["id"] for row in files._distinct([{"id": id} for id in ids])]
    assert len(set(distinct)) == len(ids)
    assert [distinct[0], distinct[2], distinct[3]] == ["a", "b", "a/2"]
    assert files._distinct([{"id": "a"}, {"id": "a"}])[1]["id"] == "a/2"
