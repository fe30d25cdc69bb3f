"""Prompts and transcripts on disk: JSON Lines, one JSON object in each line, validated.

A prompt: `{"id", "messages", "expected"?, "meta"?}`. A transcript: `{"id", "prompt_id", "effort", "tokens", "n_prompt",
"complete"?, "expected"?, "correct"?, "meta"?}`, or `"messages"` instead of `"tokens"`, which are then rendered; rows of
messages may have `tools`, `builtin_tools`, `model_identity`, `knowledge_cutoff` and `date`, as `harmony.render` has.
`expected` is the text that the final message should be; its older name `answer` is read too. `correct` states whether
it was. Messages may be those of any chat API. A system text, an effort and reasoning beside the messages are read as
`workbench convert` reads them. Other fields are ignored; blank lines, a byte-order mark and CRLF are
allowed.
"""

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int16, Int32

from workbench.bounded_json import parse_json, unique_names
from workbench.errors import InputError
from workbench.harmony.chat_messages import ChatMessages, from_chat_messages
from workbench.harmony.completion import is_complete
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.harmony.formats.row_fields import one_effort, with_reasoning, with_system
from workbench.harmony.messages import effort_of, settled_effort, shown
from workbench.harmony.preamble import prompt_options
from workbench.harmony.rendering import render_transcript
from workbench.harmony.vocabulary import Tokenizer
from workbench.inputs import regular_file
from workbench.outputs import staged
from workbench.row_output import stamp, written_by

LONGEST_ROW_BYTES = 50_000_000
_READ_BYTES = 1 << 20
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
OPTIONS = ("tools", "builtin_tools", "model_identity", "knowledge_cutoff", "date")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A row of messages must give the same ids whenever it is read, so a template that asks is told this date,
# the day gpt-oss was published.
_DATE = datetime.date(2025, 8, 5)


@dataclass(frozen=True)
class Prompt:
    """What to ask. answer: what the final message should be, if that is known. options: further arguments of render."""

    id: str
    messages: list[dict[str, Any]]
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> str | None:
        """Return the text that the final message should be, if that is known."""
        return self.answer


@dataclass(frozen=True, eq=False)
class Transcript:
    """A prompt and the response to it, as ids.

    effort: low, medium, high, or "" where it is not known. complete: whether the response ended by itself, None where
    only its last token shows it. notes: flags from reading the row, see `workbench.harmony.flags`. experts: those that
    a host routed the tokens to, read only where a capture follows them.
    """

    id: str
    prompt_id: str
    effort: str
    tokens: Int32[np.ndarray, " tokens"]
    n_prompt: int
    answer: str | None = None
    correct: bool | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    complete: bool | None = None
    notes: tuple[str, ...] = ()
    experts: Int16[np.ndarray, "tokens layers slots"] | None = None

    @property
    def expected(self) -> str | None:
        """Return the text that the final message should be, if that is known."""
        return self.answer


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used. id: "" where the row has none."""

    line: int
    id: str
    reason: str


class _BadRowError(ValueError):
    """Why a row cannot be used, in one line."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a file.

    Raises:
        InputError: a row of the file is invalid; the message names its line.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for line, row in _rows(Path(path)):
        try:
            fields = _object(row)
            prompt = Prompt(
                _unused_id(fields, seen), _prompt_messages(fields), _answer(fields), _meta(fields), _options(fields)
            )
        except _BadRowError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        seen[prompt.id] = line
        prompts.append(prompt)
    return prompts


def read_transcripts(
    path: str | Path, *, tokenizer: Tokenizer, n_ctx: int | None = None
) -> tuple[list[Transcript], list[Reject]]:
    """Return the transcripts of a file, and the rows that cannot be used: why, and where."""
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
    """Write transcripts to a temporary file and rename it when it is complete."""
    write_rows(path, map(row_of, rows), overwrite=overwrite)


def write_rows(
    path: str | Path,
    rows: Iterable[dict[str, Any]],
    *,
    overwrite: bool = False,
    command: str | None = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Write rows as JSON lines; the file appears complete or not at all.

    command: the name that each row is stamped with; only a file of such rows is replaced. Without it, any file is.

    Raises:
        InputError: the path exists, its folder does not, or it cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder: create it first")
    if command is None and path.exists() and (path.is_dir() or not overwrite):
        why = "cannot be written: it is a folder" if path.is_dir() else "exists: choose another name, or overwrite"
        raise InputError(f"{path} {why}")
    owned = Path.is_file if command is None else written_by(command)
    with (
        staged(path, command=command or "transcripts", inputs=inputs, overwrite=overwrite, owned=owned) as part,
        part.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            stamped = row if command is None else stamp(row, command)
            file.write(json.dumps(stamped, ensure_ascii=False) + "\n")


def row_of(row: Transcript) -> dict[str, Any]:
    """Return the row of a file of transcripts as an object of JSON."""
    fields: dict[str, Any] = {
        "id": row.id,
        "prompt_id": row.prompt_id,
        "effort": row.effort or None,
        "tokens": row.tokens.tolist(),
        "n_prompt": row.n_prompt,
        "complete": row.complete,
        "expected": row.answer,
        "correct": row.correct,
        "meta": row.meta or None,
        "notes": list(row.notes) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _rows(path: Path) -> Iterator[tuple[int, bytes | _BadRowError]]:
    """Yield the number and the bytes of every line that is not blank; a line that is too long is an error."""
    empty = True
    try:
        with regular_file(path) as source, source.open("rb") as file:
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
        raise InputError(f"{path} is empty: expected JSON Lines, one JSON object in each line")


def _lines(file: BinaryIO) -> Iterator[bytes | _BadRowError]:
    while first := file.readline(_READ_BYTES):
        pieces, length = [first], len(first)
        while not pieces[-1].endswith(b"\n") and (more := file.readline(_READ_BYTES)):
            length += len(more)
            pieces = [*pieces, more] if length <= LONGEST_ROW_BYTES else [more]
        if length > LONGEST_ROW_BYTES:
            yield _BadRowError(f"the row has {length:,} bytes; expected at most {LONGEST_ROW_BYTES:,}")
        else:
            yield b"".join(pieces)


def _object(row: bytes | _BadRowError) -> dict[str, Any]:
    if isinstance(row, _BadRowError):
        raise row
    try:
        fields = parse_json(row.decode("utf-8"), object_pairs_hook=unique_names)
    except UnicodeDecodeError as error:
        packed = next((name for start, name in _PACKED.items() if row.startswith(start)), None)
        remedy = f"the file is packed by {packed}: unpack it first" if packed else "save the file as UTF-8"
        raise _BadRowError(f"not UTF-8 at byte {error.start}: {remedy}") from error
    except InputError as error:
        raise _BadRowError(str(error)) from error
    if not isinstance(fields, dict):
        raise _BadRowError(f"the row is {shown(fields)}; expected an object")
    if _ESCAPED_SURROGATE.search(row):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _BadRowError("half a surrogate pair in a text: remove it") from error
    return fields


def _transcript(fields: dict[str, Any], seen: dict[str, int], tokenizer: Tokenizer, n_ctx: int | None) -> Transcript:
    id = _unused_id(fields, seen)
    prompt_id = _text(fields, "prompt_id")
    if (fields.get("tokens") is None) == (fields.get("messages") is None):
        raise _BadRowError("expected either tokens or messages")
    complete, notes = _complete(fields), _notes(fields)
    if fields.get("tokens") is not None:
        effort = _effort(_stated_effort(fields))
        tokens = _tokens(fields["tokens"], tokenizer)
        n_prompt = fields.get("n_prompt")
    else:
        effort, ids, answered, chat = _rendered(fields, tokenizer, complete)
        complete = chat.complete if complete is None else complete
        notes = (*notes, *notes_on(chat), "re_rendered")
        tokens, n_prompt = np.array(ids, dtype=np.int32), fields.get("n_prompt", answered)
    if type(n_prompt) is not int or not 0 <= n_prompt <= len(tokens):
        raise _BadRowError(
            f"n_prompt is {shown(n_prompt)}; expected how many of the {len(tokens)} tokens are the prompt"
        )
    if n_ctx is not None and len(tokens) > n_ctx:
        raise _BadRowError(f"{len(tokens):,} tokens; the model's context holds {n_ctx:,}")
    correct = _true_false(fields, "correct")
    unique = tuple(dict.fromkeys(notes))
    return Transcript(
        id, prompt_id, effort, tokens, n_prompt, _answer(fields), correct, _meta(fields), complete, unique
    )


def _rendered(
    fields: dict[str, Any], tokenizer: Tokenizer, complete: bool | None
) -> tuple[str, list[int], int, ChatMessages]:
    """Return effort, ids and length of the prompt of a row of messages."""
    options = {"date": _DATE} | _options(fields)
    given = _stated_effort(fields)
    if given not in (None, ""):
        given = _effort(given)
    chat = _chat_messages(fields, split=True, truncated=complete is False)
    try:
        effort = settled_effort(given, chat.messages)
        if effort is None:
            raise _BadRowError("the effort is missing: messages cannot be rendered without")
        ended = chat.complete if complete is None else complete
        ids, answered = render_transcript(
            chat.messages,
            options=prompt_options(effort=effort, **options),
            tokenizer=tokenizer,
            complete=ended is not False,
        )
    except InputError as error:
        raise _BadRowError(str(error)) from error
    return effort, ids, answered, chat


def notes_on(chat: ChatMessages) -> tuple[str, ...]:
    """Return the flags of what was left out when messages were read."""
    notes = {
        "irregular": chat.irregular,
        "images_left_out": chat.images,
        "fields_left_out": chat.left_out,
        "reasoning_summary": chat.summary,
    }
    return tuple(name for name, value in notes.items() if value)


def _stated_effort(fields: dict[str, Any]) -> Any:
    try:
        return one_effort(fields)
    except InputError as error:
        raise _BadRowError(str(error)) from error


def _effort(value: Any) -> str:
    try:
        return "" if value in (None, "") else effort_of(value)
    except InputError as error:
        raise _BadRowError(f"{error}, or leave it out") from error


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    options = {name: fields[name] for name in OPTIONS if fields.get(name) not in (None, [], "")}
    try:
        prompt_options(**options)
    except InputError as error:
        raise _BadRowError(str(error)) from error
    return options


def _notes(fields: dict[str, Any]) -> tuple[str, ...]:
    notes = fields.get("notes") or []
    if not isinstance(notes, list) or any(note not in SEQUENCE_FLAGS for note in notes):
        raise _BadRowError(f"notes is {shown(notes)}; expected a list of {', '.join(SEQUENCE_FLAGS)}")
    return tuple(notes)


def _complete(fields: Mapping[str, Any]) -> bool | None:
    try:
        return is_complete(fields)
    except InputError as error:
        raise _BadRowError(str(error)) from error


def _true_false(fields: dict[str, Any], name: str) -> bool | None:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise _BadRowError(f"{name} is {shown(value)}; expected true, false or null")
    return value


def _tokens(ids: Any, tokenizer: Tokenizer) -> Int32[np.ndarray, " tokens"]:
    if not isinstance(ids, list) or not ids:
        raise _BadRowError(f"tokens is {shown(ids)}; expected a list of at least one id")
    if set(map(type, ids)) != {int}:
        wrong = next(id for id in ids if type(id) is not int)
        raise _BadRowError(f"tokens holds {shown(wrong)}; expected ids, whole numbers")
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
        raise _BadRowError(f"{name} is {shown(value)}; expected text" if name in fields else f"{name} is missing")
    return value


def _chat_messages(fields: dict[str, Any], *, split: bool, truncated: bool = False) -> ChatMessages:
    if "messages" not in fields:
        raise _BadRowError("messages is missing")
    builtin, messages = fields.get("builtin_tools") or (), fields["messages"]
    try:
        if isinstance(messages, list):  # what rows have beside their messages is read as `workbench convert` reads it
            messages = with_system(fields, messages)
            messages = with_reasoning(fields, messages)[0] if split else messages
        return from_chat_messages(messages, builtin=builtin, truncated=truncated, split=split)
    except InputError as error:
        raise _BadRowError(str(error)) from error


def _prompt_messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return messages of which nothing is left out: a prompt is to be exactly what was asked."""
    chat = _chat_messages(fields, split=False)
    if chat.images or chat.left_out:
        what = chat.left_out[0] if chat.left_out else "an image"
        raise _BadRowError(f"{what} cannot be part of a prompt: remove it")
    return chat.messages


def expected_text(fields: Mapping[str, Any]) -> str | None:
    """Return `expected` of a row, or `answer`, its older name; None without either.

    Raises:
        InputError: it is not text, or the two differ.
    """
    expected, older = fields.get("expected"), fields.get("answer")
    if expected is not None and older is not None and expected != older:
        raise InputError(f"expected is {shown(expected)} and answer, its older name, {shown(older)}; keep expected")
    answer = older if expected is None else expected
    if not isinstance(answer, str | None):
        raise InputError(f"{'answer' if expected is None else 'expected'} is {shown(answer)}; expected text")
    return answer


def _answer(fields: dict[str, Any]) -> str | None:
    try:
        return expected_text(fields)
    except InputError as error:
        raise _BadRowError(str(error)) from error


def _meta(fields: dict[str, Any]) -> dict[str, Any]:
    meta = fields.get("meta")
    if not isinstance(meta, dict | None):
        raise _BadRowError(f"meta is {shown(meta)}; expected an object")
    return meta or {}
