"""Conversations in other programs' files as transcripts.

What a file is shows in its content, not in its name; `workbench.harmony.formats` lists the shapes. A file of none of
them is refused with the list of those that can be read.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.harmony.flags import counted, flags_of_row, sequence_flags
from workbench.harmony.formats import inspect_logs
from workbench.harmony.formats.containers import objects
from workbench.harmony.formats.conversation import Conversation, error_text, transcript_row
from workbench.harmony.formats.field_mapping import FINDINGS, FieldMapping, is_findings
from workbench.harmony.formats.row_fields import decoded
from workbench.harmony.formats.shapes import SHAPES, has_messages, paired, shape_of
from workbench.harmony.labels import label
from workbench.harmony.messages import EFFORTS, shown
from workbench.harmony.transcripts import LONGEST_ROW_BYTES
from workbench.harmony.vocabulary import tokenizer
from workbench.inputs import regular_file

_MOST_LEFT_OUT = 100_000  # rows: a file of others is not a file of conversations
_MOST_BYTES = 4_000_000_000  # of all rows, which are held until they are written
READABLE = (
    "an Inspect log (.eval or .json), " + ", ".join(shape.name for shape in SHAPES) + "; as JSON Lines, a JSON array, "
    "JSON documents, Parquet or a saved dataset, plain or packed by gzip or zstd"
)
_NAME_FIELDS = "name its fields with --field, such as --field prompt=question --field response=output, or give "


def convert(
    path: str | Path,
    *,
    effort: str | None = None,
    requests: str | Path | None = None,
    mapping: FieldMapping | None = None,
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Return the kind of a file, a transcript row for each conversation, and why others were left out.

    effort: of conversations that name none. requests: the request file of an OpenAI batch. mapping: where the fields of
    a conversation are, in rows of a shape that is not recognized.

    Raises:
        InputError: an unknown effort, or a file that is in none of the formats that can be read.
    """
    if effort is not None and effort not in EFFORTS:
        raise InputError(f"--effort {effort}: choose from {', '.join(EFFORTS)}")
    with _readable(path) as source, _readable(requests) if requests else nullcontext() as asked:
        try:
            return _converted(source, asked, effort, mapping or FieldMapping())
        except InputError as error:
            raise InputError(str(error).replace(str(source), str(path)).replace(str(asked), str(requests))) from error


def _readable(path: str | Path) -> AbstractContextManager[Path]:
    """Yield a folder as it is, of anything else a regular file with its content."""
    return nullcontext(Path(path)) if Path(path).is_dir() else regular_file(path)


def _converted(
    path: Path, requests: Path | None, effort: str | None, mapping: FieldMapping
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Return what `convert` does, of files that can be read."""
    kinds: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    size = 0
    for kind, where, conversation in _conversations(path, requests, mapping):
        if kind:
            kinds[kind] = None
        try:
            if isinstance(conversation, Exception):
                raise conversation
            conversation.id = conversation.id or str(len(rows) + len(left_out) + 1)
            row = transcript_row(conversation, effort)
            text = json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair could not be written
            if len(text) > LONGEST_ROW_BYTES:
                raise InputError(f"its row has {len(text):,} bytes, expected at most {LONGEST_ROW_BYTES:,}")
        except (InputError, LookupError, TypeError, ValueError, AttributeError) as error:
            left_out.append(f"{where}: {error_text(error)}")
            if len(left_out) > _MOST_LEFT_OUT:
                raise InputError(
                    f"{path} has more than {_MOST_LEFT_OUT:,} rows that cannot be used; {left_out[0]}"
                ) from None
        else:
            rows.append(row)
            size += len(text)
            if size > _MOST_BYTES:
                raise InputError(f"{path} holds more than {_MOST_BYTES:,} bytes of conversations: split it")
    if not kinds:
        why = f" ({left_out[0]})" if left_out else ""
        if mapping != FieldMapping():
            raise InputError(f"{path} has no row with the named fields{why}: name others with --field and --rows")
        raise InputError(f"{path} is not a file of conversations that can be read{why}: {_NAME_FIELDS}{READABLE}")
    return " and ".join(kinds), _distinct(rows), left_out


def counts(rows: list[dict[str, Any]]) -> str:
    """Return how many rows are irregular, truncated and so on, in words."""
    return counted(_flags(row) for row in rows)


def _flags(row: dict[str, Any]) -> tuple[str, ...]:
    if "tokens" not in row:
        return flags_of_row(row)
    labels = label(row["tokens"], tokenizer=tokenizer(), n_prompt=row["n_prompt"])
    return sequence_flags(labels, row["n_prompt"], complete=row.get("complete"), notes=row.get("notes", ()))


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows; a row whose id an earlier row has gets a number appended that makes its id unique."""
    taken, counts = {row["id"] for row in rows}, dict[str, int]()
    for row in rows:
        id = row["id"]
        n = counts.get(id, 0) + 1
        if n > 1:
            while (own := f"{id}/{n}") in taken:
                n += 1
            row["id"] = own
            taken.add(own)
        counts[id] = n
    return rows


Found = Iterator[tuple[str, str, Conversation | Exception]]


def _conversations(path: Path, requests: str | Path | None, mapping: FieldMapping) -> Found:
    """Yield the kind of each conversation, where it is, and the conversation, or why there is none."""
    if path.is_file() and inspect_logs.is_zip(path):
        yield from (("an Inspect log", *conversation) for conversation in inspect_logs.read_zip(path))
        return
    asked = _requests(Path(requests)) if requests is not None else {}
    container, values = objects(path)
    form = "" if container == "JSON" else f" ({container})"
    first = True
    for where, value in values:
        if first and inspect_logs.is_log(value):
            yield from (("an Inspect log" + form, *conversation) for conversation in inspect_logs.read_document(value))
            return
        first = False
        rows = FINDINGS if mapping == FieldMapping() and is_findings(value) else mapping
        for place, row in rows.expanded(value, where) if not isinstance(value, Exception) else [(where, value)]:
            yield from _of_row(row, place, form, asked)


def _of_row(value: Any, where: str, form: str, asked: dict[str, Any]) -> Found:
    if isinstance(value, Exception):
        yield "", where, value
        return
    if isinstance(value, list) and has_messages(value):
        value = {"messages": value}
    value = decoded(value)
    shape = shape_of(value)
    if shape is None:
        yield "", where, InputError(f"{shown(value)} is not a conversation of a known shape")
        return
    try:
        if asked and "custom_id" in value and "request" not in value:
            conversations = _of_batch(value, asked)
        else:
            conversations = shape.read(value)
        for conversation in conversations:
            yield shape.name + form, where, conversation
    except (InputError, LookupError, TypeError, ValueError, AttributeError) as error:
        yield shape.name + form, where, InputError(error_text(error))


def _of_batch(value: dict[str, Any], asked: dict[str, Any]) -> Iterator[Conversation]:
    """Return the conversations of a batch's response.

    Raises:
        InputError: its request is not among those of the batch, or it holds an error.
    """
    id = str(value["custom_id"])
    if id not in asked:
        raise InputError(f"the file of requests has none of the custom_id {shown(id)}: give the file of this batch")
    response = value.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    error = value.get("error") or (body.get("error") if isinstance(body, dict) else None)
    if not isinstance(body, dict) or error:
        raise InputError(f"the request {shown(id)} failed: {shown(error)}")
    return paired(asked[id], body, {"custom_id": value["custom_id"]})


def _requests(path: Path) -> dict[str, Any]:
    """Return the bodies of a batch's requests by custom_id."""
    bodies: dict[str, Any] = {}
    for where, value in objects(path)[1]:
        if not isinstance(value, dict) or "custom_id" not in value or not isinstance(value.get("body"), dict):
            raise InputError(f"{path}, {where}: expected a request with custom_id and body")
        if (id := str(value["custom_id"])) in bodies:
            raise InputError(f"{path}, {where}: the custom_id {shown(id)} is that of an earlier request: keep one")
        bodies[id] = value["body"]
    return bodies
