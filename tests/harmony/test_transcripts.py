"""Prompt and transcript files: what is written comes back, what cannot be used is named."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony import transcripts
from workbench.harmony.transcripts import Transcript, read_prompts, read_transcripts, write_transcripts
from workbench.harmony.vocabulary import Tokenizer

Row = dict[str, Any]
ASK: list[Row] = [{"role": "user", "content": "2+3"}]
ANSWERED = [*ASK, {"role": "assistant", "channel": "final", "content": "5"}]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=5
)


def row(**fields: Any) -> Row:
    good = {"id": "a", "prompt_id": "p", "effort": "low", "tokens": [1, 2, 3], "n_prompt": 2}
    return {name: value for name, value in (good | fields).items() if value is not ...}


def written(folder: Path, *rows: Row | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def fields_of(transcript: Transcript) -> Row:
    return {**vars(transcript), "tokens": transcript.tokens.tolist()}


rows = st.builds(
    Transcript,
    id=TEXT,
    prompt_id=TEXT,
    effort=st.sampled_from(("", "low", "medium", "high")),
    tokens=st.lists(st.integers(0, 64), min_size=1).map(lambda ids: np.array(ids, dtype=np.int32)),
    n_prompt=st.just(1),
    answer=st.none() | TEXT,
    correct=st.none() | st.booleans(),
    meta=st.dictionaries(TEXT, JSON),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(rows=st.lists(rows, min_size=1, unique_by=lambda row: row.id))
def test_what_is_written_comes_back(rows: list[Transcript], tmp_path: Path, small: Tokenizer) -> None:
    path = tmp_path / "with spaces ü.jsonl"
    write_transcripts(path, rows, overwrite=True)
    back, rejects = read_transcripts(path, tokenizer=small)
    assert rejects == []
    assert list(map(fields_of, back)) == list(map(fields_of, rows))
    assert all(row.tokens.dtype == np.int32 for row in back)


BAD_ROWS: dict[str, tuple[Row | bytes, str]] = {
    "not JSON": (b"{'id': 'a'}", "not JSON"),
    "half a row": (b'{"id": "a", "tok', "not JSON"),
    "nested too deeply": (b"[" * 100_000, "invalid JSON"),
    "a number of many digits": (b'{"id": ' + b"1" * 10_000 + b"}", "not JSON"),
    "not UTF-8": (b'{"id": "\xe4"}', "not UTF-8 at byte 8"),
    "UTF-16": ('{"id": "a"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "no object": (b'["id"]', "expected an object"),
    "no id": (row(id=...), "id is missing"),
    "a number as id": (row(id=5), "id is 5; expected text"),
    "an empty id": (row(id=""), "id is ''"),
    "no prompt id": (row(prompt_id=...), "prompt_id is missing"),
    "unknown effort": (row(effort="extreme"), "unknown effort 'extreme': choose from low, medium, high"),
    "false effort": (row(effort=False), "unknown effort False"),
    "a list as effort": (row(effort=["low"]), "unknown effort"),
    "neither tokens nor messages": (row(tokens=...), "expected either tokens or messages"),
    "tokens and messages": (row(messages=ASK), "expected either tokens or messages"),
    "empty tokens": (row(tokens=[]), "tokens is []; expected a list of at least one id"),
    "text as tokens": (row(tokens="123"), "tokens is '123'"),
    "an id beyond the vocabulary": (row(tokens=[1, 65]), "tokens holds 65; small has ids from 0 to 64"),
    "an enormous id": (row(tokens=[1, 10**30]), "tokens holds 1000000000000000000000000000000"),
    "a negative id": (row(tokens=[1, -1]), "tokens holds -1"),
    "a float id": (row(tokens=[1, 2.0]), "tokens holds 2.0; expected ids"),
    "a text id": (row(tokens=[1, "2"]), "tokens holds '2'"),
    "a bool id": (row(tokens=[1, True]), "tokens holds True"),
    "a NaN id": (b'{"id": "a", "prompt_id": "p", "tokens": [NaN], "n_prompt": 0}', "tokens holds nan"),
    "no n_prompt": (row(n_prompt=...), "n_prompt is None; expected how many of the 3 tokens"),
    "n_prompt beyond the end": (row(n_prompt=4), "n_prompt is 4"),
    "negative n_prompt": (row(n_prompt=-1), "n_prompt is -1"),
    "n_prompt of a float": (row(n_prompt=2.0), "n_prompt is 2.0"),
    "n_prompt of a bool": (row(n_prompt=True), "n_prompt is True"),
    "longer than the context": (row(tokens=[1] * 41), "41 tokens; the model's context holds 40"),
    "correct as a number": (row(correct=1), "correct is 1; expected true, false or null"),
    "another answer": (row(answer="5", expected="6"), "keep expected"),
    "a number as answer": (row(answer=42), "answer is 42; expected text"),
    "a list as meta": (row(meta=[]), "meta is []; expected an object"),
    "a lone surrogate in the id": (rb'{"id": "\ud83d"}', "half a surrogate pair"),
    "a lone surrogate in meta": (row(meta={"a": {"b": ["\udc00"]}}), "half a surrogate pair"),
    "messages without content": (row(tokens=..., messages=[{"role": "user"}]), "message 1: its content is None"),
    "an unknown role": (row(tokens=..., messages=[{"role": "robot", "content": ""}]), "unknown role 'robot'"),
    "messages without effort": (row(tokens=..., messages=ASK, effort=None), "effort is missing"),
    "a text outside the vocabulary": (row(tokens=..., messages=[{"role": "user", "content": "Ü"}]), "'Ü'"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_a_reject_and_the_others_are_read(
    bad: Row | bytes, reason: str, tmp_path: Path, small: Tokenizer
) -> None:
    path = written(tmp_path, row(id="first"), bad, row(id="last"))
    good, rejects = read_transcripts(path, tokenizer=small, n_ctx=40)
    assert [t.id for t in good] == ["first", "last"]
    (reject,) = rejects
    assert reject.line == 2
    assert reason in reject.reason
    assert "\n" not in reject.reason
    assert len(reject.reason) < 250


def test_a_second_row_of_an_id_is_a_reject(tmp_path: Path, small: Tokenizer) -> None:
    good, rejects = read_transcripts(written(tmp_path, row(n_prompt=9), row(), row()), tokenizer=small)
    assert len(good) == 1
    assert [(r.line, r.id, r.reason[:13]) for r in rejects] == [(1, "a", "n_prompt is 9"), (3, "a", "the id 'a' is")]
    assert "line 2" in rejects[1].reason


def test_reasons_show_no_escape_sequences(tmp_path: Path, small: Tokenizer) -> None:
    evil = "\x1b[2J<script>\r\n"
    path = written(tmp_path, row(effort=evil), row(id=evil), row(id=evil), row(tokens=[evil]))
    good, rejects = read_transcripts(path, tokenizer=small)
    assert [t.id for t in good] == [evil]
    assert len(rejects) == 3
    assert all(reject.reason.isprintable() for reject in rejects)


def test_blank_lines_bom_and_crlf_are_fine(tmp_path: Path, small: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(id="a")), "", "  \t", json.dumps(row(id="🦄")), "oops"]  # the unicorn as an escaped pair
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    good, rejects = read_transcripts(path, tokenizer=small)
    assert [t.id for t in good] == ["a", "🦄"]
    assert [r.line for r in rejects] == [5]


def test_a_row_too_long_is_passed_over(tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert transcripts.LONGEST_ROW_BYTES == 50_000_000
    monkeypatch.setattr(transcripts, "LONGEST_ROW_BYTES", 1000)
    monkeypatch.setattr(transcripts, "_READ_BYTES", 64)
    long = row(meta={"x": "y" * 1000})
    fits = row(id="b", meta={"x": "y" * 850})
    good, rejects = read_transcripts(written(tmp_path, long, fits, b"", b"x" * 5000), tokenizer=small)
    assert [t.id for t in good] == ["b"]
    assert [r.line for r in rejects] == [1, 4]
    assert "expected at most 1,000" in rejects[0].reason


def test_an_enormous_row_is_not_held_in_memory(tmp_path: Path, small: Tokenizer) -> None:
    import tracemalloc

    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(200_000_000)  # one line of 200 MB, on a sparse file
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(row()).encode())
    tracemalloc.start()
    good, rejects = read_transcripts(path, tokenizer=small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(good) == len(rejects) == 1
    assert peak < 60_000_000


def test_messages_are_rendered_the_same_on_every_day(small: Tokenizer, tmp_path: Path) -> None:
    small = replace_template(small, "{{ strftime_now('%d.%m.%Y') }}" + (small.chat_template or ""))
    path = written(tmp_path, row(tokens=..., n_prompt=..., messages=ANSWERED))
    ((transcript,), rejects) = read_transcripts(path, tokenizer=small)
    assert rejects == []
    assert small.decode(transcript.tokens.tolist()) == (
        "05.08.2025<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>2+3<|end|>"
        "<|start|>assistant<|channel|>final<|message|>5<|return|>"
    )
    prompt = small.decode(transcript.tokens[: transcript.n_prompt].tolist())
    assert prompt.endswith("2+3<|end|><|start|>assistant")


def replace_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    import copy

    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_a_given_n_prompt_of_messages_counts(small: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path, row(tokens=..., messages=ANSWERED, n_prompt=3))
    assert read_transcripts(path, tokenizer=small)[0][0].n_prompt == 3


def test_every_effort_may_be_unknown_for_tokens(small: Tokenizer, tmp_path: Path) -> None:
    path = written(tmp_path, row(id="a", effort=None), row(id="b", effort=...), row(id="c", effort=""))
    assert [t.effort for t in read_transcripts(path, tokenizer=small)[0]] == ["", "", ""]


def read(path: Path, tokenizer: Tokenizer) -> None:
    read_transcripts(path, tokenizer=tokenizer)


@pytest.mark.parametrize("reader", [read, lambda path, _: read_prompts(path)], ids=["transcripts", "prompts"])
def test_a_file_without_rows_is_refused(
    reader: Callable[[Path, Tokenizer], None], tmp_path: Path, small: Tokenizer
) -> None:
    for content in (b"", b"\n\r\n  \n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=r"empty\.jsonl is empty: expected JSON Lines"):
            reader(tmp_path / "empty.jsonl", small)
    with pytest.raises(InputError, match=r"absent\.jsonl cannot be read: No such file"):
        reader(tmp_path / "absent.jsonl", small)
    with pytest.raises(InputError, match="is a folder; give a file"):
        reader(tmp_path, small)


def test_prompts_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"id": "a", "messages": ASK},
        b"",
        {"id": "b", "messages": ASK, "answer": "5", "meta": {"task": "sum"}},
    )
    assert read_prompts(path) == [harmony.Prompt("a", ASK), harmony.Prompt("b", ASK, "5", {"task": "sum"})]


BAD_PROMPTS: dict[str, tuple[Row | bytes, str]] = {
    "not JSON": (b"oops", "not JSON"),
    "no id": ({"messages": ASK}, "id is missing"),
    "no messages": ({"id": "b"}, "messages is missing"),
    "no message": ({"id": "b", "messages": []}, "at least one message"),
    "messages without content": ({"id": "b", "messages": [{"role": "user"}]}, "message 1: its content is None"),
    "unknown role": ({"id": "b", "messages": [{"role": "x", "content": ""}]}, "unknown role 'x'"),
    "an id again": ({"id": "a", "messages": ASK}, "the id 'a' is that of line 1"),
    "another answer": ({"id": "b", "messages": ASK, "answer": "5", "expected": "6"}, "keep expected"),
    "a number as answer": ({"id": "b", "messages": ASK, "answer": 5}, "answer is 5"),
    "a text as meta": ({"id": "b", "messages": ASK, "meta": "sum"}, "meta is 'sum'"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_refuses_the_file(bad: Row | bytes, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"id": "a", "messages": ASK}, bad)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: ") as caught:
        read_prompts(path)
    assert reason in str(caught.value)


TRANSCRIPT = Transcript("a", "p", "low", np.array([1, 2], dtype=np.int32), 1)


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("precious")
    with pytest.raises(InputError, match="exists: choose another name, or overwrite"):
        write_transcripts(path, [TRANSCRIPT])
    assert path.read_text() == "precious"
    write_transcripts(path, [TRANSCRIPT], overwrite=True)
    assert json.loads(path.read_text()) == {
        "id": "a",
        "prompt_id": "p",
        "effort": "low",
        "tokens": [1, 2],
        "n_prompt": 1,
    }


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("precious")
    for bad in (replace(TRANSCRIPT, meta={"x": object()}), replace(TRANSCRIPT, answer="\ud800")):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            write_transcripts(path, [TRANSCRIPT, bad], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert path.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is not a folder: create it first"):
        write_transcripts(tmp_path / "absent" / "rows.jsonl", [TRANSCRIPT])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_transcripts(tmp_path / "folder", [TRANSCRIPT], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_rows_have_beside_their_messages_is_read_as_convert_reads_it(tmp_path: Path) -> None:
    words = harmony.tokenizer()
    plain = row(tokens=..., n_prompt=..., messages=ANSWERED, effort=...)
    both = [{"role": "system", "content": "Be brief."}, *ASK]
    answers = [{"role": "assistant", "channel": "analysis", "content": "two and three"}, *ANSWERED[1:]]
    expected = plain | {"messages": [*both, *answers], "effort": "high"}
    beside = plain | {"system": "Be brief.", "reasoning_content": "two and three", "reasoning_effort": "high"}

    def read(fields: Row) -> Row:
        (transcript,), rejects = read_transcripts(written(tmp_path, fields), tokenizer=words)
        assert rejects == []
        return fields_of(transcript)

    assert read(beside) == read(expected)
    assert read(plain | {"effort": "high"})["tokens"] != read(expected)["tokens"]  # negative control
    assert read(row(effort=..., reasoning_effort="high"))["effort"] == "high"
    _, (reject,) = read_transcripts(written(tmp_path, row(reasoning_effort="high")), tokenizer=words)
    assert "names the efforts high and low: keep one" in reject.reason
    (prompt,) = read_prompts(written(tmp_path, {"id": "a", "messages": ASK, "system_prompt": "Be brief."}))
    assert prompt.messages == both
