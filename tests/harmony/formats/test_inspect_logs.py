"""Logs of Inspect with absurd sizes, depths and counts are refused, or lose the sample that has them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.harmony.formats import inspect_logs
from workbench.harmony.hosts.files import convert

MESSAGES = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
HEADER = {"eval": {"task": "sums", "model": "m"}, "plan": {"config": {"reasoning_effort": "low"}}}


def sample(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "epoch": 1, "messages": MESSAGES, **fields}


def write_log(path: Path, *samples: Any, method: int = zipfile.ZIP_DEFLATED, header: Any = HEADER) -> Path:
    with zipfile.ZipFile(path, "w", method) as log:
        log.writestr("header.json", json.dumps(header))
        for number, one in enumerate(samples):
            log.writestr(f"samples/{number}_epoch_1.json", one if isinstance(one, str) else json.dumps(one))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError, match="not a complete Inspect log") as raised:
        convert(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_log(tmp_path / "x.eval", sample(0, padding="x" * 3_000_000))
    assert path.stat().st_size < 20_000
    assert len(convert(path)[1]) == 1, "the negative control: within the limit it is read"
    monkeypatch.setattr(inspect_logs, "_LONGEST_MEMBER", 1_000_000)
    assert "expected at most 1,000,000" in refusal(path)


def test_a_member_that_lies_about_its_size_is_cut_off(tmp_path: Path) -> None:
    path = write_log(tmp_path / "x.eval", sample(0, padding="x" * 3_000_000))
    with zipfile.ZipFile(path) as log:
        size = log.getinfo("samples/0_epoch_1.json").file_size
    data = path.read_bytes()
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    assert "samples/0_epoch_1.json" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_listed_many_times_counts_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.eval"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as log:
        log.writestr("header.json", json.dumps(HEADER))
        for _ in range(50):
            log.writestr("samples/0_epoch_1.json", json.dumps(sample(0, padding="x" * 10_000)))
    monkeypatch.setattr(inspect_logs, "_LONGEST_LOG", 100_000)
    assert "its samples unpack to 50" in refusal(path)


def test_a_text_that_is_named_many_times_is_not_inserted_for_ever(tmp_path: Path) -> None:
    """A megabyte of text named a thousand times; another sample of the log is kept."""
    many = [{"role": "user", "content": "attachment://a"}] * 1000
    bomb = sample(0, messages=many, attachments={"a": "x" * 1_000_000})
    _, rows, left_out = convert(write_log(tmp_path / "x.eval", bomb, sample(1)))
    assert [row["id"] for row in rows] == ["1/1"]
    assert "its attachments make more than 200,000,000 characters" in left_out[0]


def test_a_sample_that_nests_too_deep_is_left_out(tmp_path: Path) -> None:
    deep = json.dumps(sample(0))[:-1] + ', "metadata": ' + "[" * 100_000 + "]" * 100_000 + "}"
    _, rows, left_out = convert(write_log(tmp_path / "x.eval", deep, sample(1)))
    assert [row["id"] for row in rows] == ["1/1"]
    assert "nested deeper than 100 levels" in left_out[0]


@pytest.mark.parametrize(
    "malformed",
    [
        [],
        7,
        {},
        sample(0, messages=7),
        sample(0, scores=[1]),
        sample(0, attachments=[1]),
        sample(0, output={"choices": 1}),
        sample(0, events=[{"event": "model", "tools": 7}]),
        sample(0, metadata=[1, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["zip", "document"])
def test_a_malformed_sample_is_left_out(malformed: Any, form: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if form == "zip":
        write_log(path, malformed, sample(1))
    else:
        path.write_text(json.dumps({"version": 2, **HEADER, "samples": [malformed, sample(1)]}))
    _, rows, left_out = convert(path)
    assert [row["id"] for row in rows] == ["1/1"]
    assert len(left_out) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def corrupt(path: Path) -> None:
    with zipfile.ZipFile(path) as log:
        at = log.getinfo("samples/0_epoch_1.json").header_offset + 60
    data = bytearray(path.read_bytes())
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, corrupt])
def test_a_damaged_archive_is_one_line(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = write_log(tmp_path / "x.eval", sample(0, padding="abcdefghijk" * 100))
    damage(path)
    refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(method: int, tmp_path: Path) -> None:
    assert "is compressed by the method" in refusal(write_log(tmp_path / "x.eval", sample(0), method=method))


@pytest.mark.parametrize("header", [[], 7, {"eval": 7}, {"plan": {"config": [1]}}])
def test_a_header_that_is_none_is_one_line(header: Any, tmp_path: Path) -> None:
    path = write_log(tmp_path / "x.eval", sample(0), header=header)
    _, rows, left_out = convert(path)
    assert not rows
    assert len(left_out) == 1


@pytest.mark.parametrize(
    ("scores", "correct"),
    [(["C"], True), (["I", "C"], None), (["C", "C"], True), ([{"x": 1}, "I"], False), ([0.5], None)],
)
def test_scores_that_differ_state_no_grade(scores: list[Any], correct: bool | None, tmp_path: Path) -> None:
    values = {f"scorer {i}": {"value": value} for i, value in enumerate(scores)}
    (row,) = convert(write_log(tmp_path / "x.eval", sample(0, scores=values)))[1]
    assert row.get("correct") is correct
    assert row["meta"]["scores"] == values


def test_the_error_of_a_tool_is_what_the_model_was_given(tmp_path: Path) -> None:
    call = {"id": "c", "function": "calc", "arguments": {"x": 1}, "type": "function"}
    result = {"role": "tool", "tool_call_id": "c", "function": "calc", "content": ""}

    def contents(error: Any) -> list[str]:
        messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {**result, "error": error}]
        (row,) = convert(write_log(tmp_path / "x.eval", sample(0, messages=[*messages, MESSAGES[1]])))[1]
        return [m["content"] for m in row["messages"] if m["role"] == "tool"]

    assert contents({"type": "timeout", "message": "too slow"}) == ["too slow"]
    assert contents(None) == [""]  # negative control
