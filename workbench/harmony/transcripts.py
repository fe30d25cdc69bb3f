"""Prompts and transcripts on disk: JSON Lines, a row a line, read with suspicion.

A prompt: `{"id", "messages", "answer"?, "meta"?}`. A transcript: `{"id", "prompt_id", "effort", "tokens", "n_prompt",
"answer"?, "correct"?, "meta"?}`, or `"messages"` instead of `"tokens"`, which are then rendered. Other fields are
ignored; blank lines, a byte-order mark and CRLF are fine.
"""

import datetime
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32

from workbench.errors import InputError
from workbench.harmony.rendering import EFFORTS, check_messages, render_transcript, shown
from workbench.harmony.vocabulary import Tokenizer

_LONGEST_ROW_BYTES = 50_000_000
_READ_BYTES = 1 << 20
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A row of messages must give the same ids whenever it is read, so a template that asks is told this date,
# the day gpt-oss was published.
_DATE = datetime.date(2025, 8, 5)


@dataclass(frozen=True)
class Prompt:
    """What to ask. answer: what the final message should say, if that is known."""

    id: str
    messages: list[dict[str, Any]]
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Transcript:
    """A prompt and what was said to it, as ids. effort: low, medium, high, or "" where it is not known."""

    id: str
    prompt_id: str
    effort: str
    tokens: Int32[np.ndarray, " tokens"]
    n_prompt: int
    answer: str | None = None
    correct: bool | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used. id: "" where the row has none."""

    line: int
    id: str
    reason: str


class _BadRowError(ValueError):
    """Why a row cannot be used, in one line."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file; one bad row refuses the file."""
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for line, row in _rows(Path(path)):
        try:
            fields = _object(row)
            prompt = Prompt(_unused_id(fields, seen), _messages(fields), _answer(fields), _meta(fields))
        except _BadRowError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        seen[prompt.id] = line
        prompts.append(prompt)
    return prompts


def read_transcripts(
    path: str | Path, *, tokenizer: Tokenizer, n_ctx: int | None = None
) -> tuple[list[Transcript], list[Reject]]:
    """The transcripts of a file, and the rows that cannot be used: why, and where."""
    transcripts: list[Transcript] = []
    rejects: list[Reject] = []
    seen: dict[str, int] = {}
    for line, row in _rows(Path(path)):
        fields: dict[str, Any] = {}
        try:
            fields = _object(row)
            transcript = _transcript(fields, seen, tokenizer, n_ctx)
        except _BadRowError as error:
            id = fields.get("id")
            rejects.append(Reject(line, id if isinstance(id, str) else "", str(error)))
        else:
            seen[transcript.id] = line
            transcripts.append(transcript)
    return transcripts, rejects


def write_transcripts(path: str | Path, rows: Iterable[Transcript], *, overwrite: bool = False) -> None:
    """Write transcripts, all or nothing: a file under another name takes its place when it is whole."""
    write_rows(path, map(_as_json, rows), overwrite=overwrite)


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], *, overwrite: bool = False) -> None:
    """Write rows as they are, all or nothing."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another name, or overwrite")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it first")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _as_json(row: Transcript) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": row.id, "prompt_id": row.prompt_id, "effort": row.effort or None, "tokens": row.tokens.tolist(),
        "n_prompt": row.n_prompt, "answer": row.answer, "correct": row.correct, "meta": row.meta or None,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def _rows(path: Path) -> Iterator[tuple[int, bytes | _BadRowError]]:
    """Number and bytes of every line that is not blank; a line too long to keep is passed over, and is an error."""
    empty = True
    try:
        with path.open("rb") as file:
            for line, content in enumerate(_lines(file), 1):
                row = (
                    content if line > 1 or isinstance(content, _BadRowError) else content.removeprefix(b"\xef\xbb\xbf")
                )
                if isinstance(row, _BadRowError) or row.strip():
                    empty = False
                    yield line, row
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise InputError(f"{path} is empty; wanted JSON Lines, a row a line")


def _lines(file: BinaryIO) -> Iterator[bytes | _BadRowError]:
    while first := file.readline(_READ_BYTES):
        pieces, length = [first], len(first)
        while not pieces[-1].endswith(b"\n") and (more := file.readline(_READ_BYTES)):
            length += len(more)
            pieces = [*pieces, more] if length <= _LONGEST_ROW_BYTES else [more]
        if length > _LONGEST_ROW_BYTES:
            yield _BadRowError(f"the row has {length:,} bytes; wanted at most {_LONGEST_ROW_BYTES:,}")
        else:
            yield b"".join(pieces)


def _object(row: bytes | _BadRowError) -> dict[str, Any]:
    if isinstance(row, _BadRowError):
        raise row
    try:
        fields = json.loads(row.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _BadRowError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _BadRowError(f"the row is {shown(fields)}; wanted an object")
    if _ESCAPED_SURROGATE.search(row):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _BadRowError("half a surrogate pair in a text: remove it") from error
    return fields


def _transcript(fields: dict[str, Any], seen: dict[str, int], tokenizer: Tokenizer, n_ctx: int | None) -> Transcript:
    id = _unused_id(fields, seen)
    prompt_id = _text(fields, "prompt_id")
    effort = "" if fields.get("effort") is None else fields["effort"]
    if effort not in ("", *EFFORTS):
        raise _BadRowError(f"unknown effort {shown(effort)}: choose from {', '.join(EFFORTS)}, or leave it out")
    if (fields.get("tokens") is None) == (fields.get("messages") is None):
        raise _BadRowError("wanted either tokens or messages")
    if fields.get("tokens") is not None:
        tokens = _tokens(fields["tokens"], tokenizer)
        n_prompt = fields.get("n_prompt")
    else:
        messages = _messages(fields)
        if not effort:
            raise _BadRowError("the effort is missing: messages cannot be rendered without")
        try:
            ids, answered = render_transcript(messages, effort=effort, tokenizer=tokenizer, date=_DATE)
        except InputError as error:
            raise _BadRowError(str(error)) from error
        tokens, n_prompt = np.array(ids, dtype=np.int32), fields.get("n_prompt", answered)
    if type(n_prompt) is not int or not 0 <= n_prompt <= len(tokens):
        raise _BadRowError(f"n_prompt is {shown(n_prompt)}; wanted how many of the {len(tokens)} tokens are the prompt")
    if n_ctx is not None and len(tokens) > n_ctx:
        raise _BadRowError(f"{len(tokens):,} tokens; the model's context holds {n_ctx:,}")
    correct = fields.get("correct")
    if not isinstance(correct, bool | None):
        raise _BadRowError(f"correct is {shown(correct)}; wanted true, false or null")
    return Transcript(id, prompt_id, effort, tokens, n_prompt, _answer(fields), correct, _meta(fields))


def _tokens(ids: Any, tokenizer: Tokenizer) -> Int32[np.ndarray, " tokens"]:
    if not isinstance(ids, list) or not ids:
        raise _BadRowError(f"tokens is {shown(ids)}; wanted a list of at least one id")
    if set(map(type, ids)) != {int}:
        wrong = next(id for id in ids if type(id) is not int)
        raise _BadRowError(f"tokens holds {shown(wrong)}; wanted ids, whole numbers")
    if min(ids) < 0 or max(ids) >= tokenizer.d_vocab:
        wrong = next(id for id in ids if not 0 <= id < tokenizer.d_vocab)
        raise _BadRowError(f"tokens holds {shown(wrong)}; {tokenizer.name} has ids from 0 to {tokenizer.d_vocab - 1:,}")
    return np.array(ids, dtype=np.int32)


def _unused_id(fields: dict[str, Any], seen: dict[str, int]) -> str:
    id = _text(fields, "id")
    if id in seen:
        raise _BadRowError(f"the id {shown(id)} is that of line {seen[id]}: an id names one row")
    return id


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise _BadRowError(f"{name} is {shown(value)}; wanted text" if name in fields else f"{name} is missing")
    return value


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in fields:
        raise _BadRowError("messages is missing")
    try:
        check_messages(fields["messages"])
    except InputError as error:
        raise _BadRowError(str(error)) from error
    return list(fields["messages"])


def _answer(fields: dict[str, Any]) -> str | None:
    answer = fields.get("answer")
    if not isinstance(answer, str | None):
        raise _BadRowError(f"answer is {shown(answer)}; wanted text")
    return answer


def _meta(fields: dict[str, Any]) -> dict[str, Any]:
    meta = fields.get("meta")
    if not isinstance(meta, dict | None):
        raise _BadRowError(f"meta is {shown(meta)}; wanted an object")
    return meta or {}
