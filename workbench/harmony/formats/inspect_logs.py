"""Evaluation logs of Inspect: a zip of JSON (.eval) or one JSON document (.json).

Members of the zip may be compressed by zstd, which Python's own zipfile does not read before 3.14. A log of a run that
did not end has its header in a journal.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.completion import is_complete
from workbench.harmony.formats.conversation import Conversation, error_text

_ZSTD = 93
_LONGEST_MEMBER = 200_000_000  # bytes, unpacked; also of a sample with the texts that it keeps aside
_LONGEST_LOG = 20_000_000_000  # bytes of all samples, unpacked
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, _ZSTD)  # LZMA takes gigabytes if a header asks for them
# what a damaged archive raises
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError, OSError, pa.ArrowException)
# what a value of another type or a missing field in a sample raises
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


def is_zip(path: Path) -> bool:
    """Return whether a file starts as a zip does."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def is_log(document: Any) -> bool:
    """Return whether a JSON document is a log of Inspect."""
    return isinstance(document, Mapping) and {"eval", "samples"} <= document.keys() and "version" in document


def read_zip(path: Path) -> Iterator[tuple[str, Conversation | InputError]]:
    """Yield the conversations of an .eval file, and an error for each sample that cannot be used.

    Raises:
        InputError: the file is a zip archive but not a complete Inspect log, or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(path) as log:
            names = log.namelist()
            header = parse_json(_member(log, "header.json" if "header.json" in names else "_journal/start.json"))
            samples = sorted(n for n in names if n.startswith("samples/") and n.endswith(".json"))
            if (size := sum(log.getinfo(name).file_size for name in samples)) > _LONGEST_LOG:
                raise ValueError(f"its samples unpack to {size:,} bytes, expected at most {_LONGEST_LOG:,}")
            for name in samples:
                yield name, _read_sample(_member(log, name), header)
    except _DAMAGE as error:
        raise InputError(f"{path} is a zip, but not a complete Inspect log: {error_text(error)}") from error


def _read_sample(content: bytes, header: Any) -> Conversation | InputError:
    try:
        return from_sample(parse_json(content), header)
    except _MALFORMED as error:
        return InputError(error_text(error))


def read_document(log: Mapping[str, Any]) -> Iterator[tuple[str, Conversation | InputError]]:
    """Yield the conversations of a log in one document, and an error for each sample that cannot be used."""
    samples = log.get("samples")
    for number, sample in enumerate(samples if isinstance(samples, list) else [], 1):
        try:
            yield f"sample {number}", from_sample(sample, log)
        except _MALFORMED as error:
            yield f"sample {number}", InputError(error_text(error))


def _member(log: zipfile.ZipFile, name: str) -> bytes:
    info = log.getinfo(name)
    if info.file_size > _LONGEST_MEMBER:
        raise ValueError(f"{name} unpacks to {info.file_size:,} bytes, expected at most {_LONGEST_MEMBER:,}")
    if info.compress_type not in _METHODS:
        raise ValueError(f"{name} is compressed by the method {info.compress_type}, expected deflate or zstd")
    if info.compress_type != _ZSTD:
        with log.open(info) as member:  # `log.read` unpacks all of it, whatever size the member is said to have
            return member.read(info.file_size)
    assert log.fp is not None
    log.fp.seek(info.header_offset + 26)
    lengths = log.fp.read(4)  # of the name and the extra field, which stand before the data
    log.fp.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
    with pa.input_stream(pa.BufferReader(log.fp.read(info.compress_size)), compression="zstd") as stream:
        unpacked: bytes = stream.read(info.file_size + 1)
    if len(unpacked) != info.file_size:
        raise ValueError(f"{name} is damaged")
    return unpacked


def from_sample(sample: Mapping[str, Any], log: Mapping[str, Any]) -> Conversation:
    """Return the one sample of a log as a conversation.

    Raises:
        InputError: it is too long with the texts that it keeps aside. A missing field is a KeyError.
    """
    evaluation, plan = log.get("eval") or {}, log.get("plan") or {}
    config = {**(evaluation.get("model_generate_config") or {}), **(plan.get("config") or {})}
    attachments = Attachments(sample.get("attachments") or {})
    scores = [score.get("value") for score in (sample.get("scores") or {}).values() if isinstance(score, dict)]
    judged = {value for value in map(_judged, scores) if value is not None}
    target = sample.get("target")
    calls = [event for event in sample.get("events") or [] if isinstance(event, dict) and event.get("event") == "model"]
    choices = (sample.get("output") or {}).get("choices") or [{}]
    meta = {"task": str(evaluation.get("task", "")), **(sample.get("metadata") or {})}
    meta |= {"model": evaluation.get("model", ""), "source": "inspect", "scores": sample.get("scores") or {}}
    tools = calls[0].get("tools") if calls else None
    return Conversation(
        id=f"{sample['id']}/{sample.get('epoch', 1)}",
        prompt_id=str(sample["id"]),
        effort=config.get("reasoning_effort"),
        messages=[attachments.inserted(message) for message in sample["messages"]],
        options={"tools": attachments.inserted(tools)} if tools else {},
        complete=False if is_complete(choices[0]) is False else None,
        answer=target if isinstance(target, str) else None,
        correct=judged.pop() if len(judged) == 1 else None,  # of two scores that differ, nothing shows which counts
        meta=meta,
    )


class Attachments:
    """Long texts that a sample keeps aside and names by their digest; each may be named any number of times."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts, self._left = texts, _LONGEST_MEMBER

    def inserted(self, value: Any) -> Any:
        """Return a JSON value with the texts inserted instead of their names.

        Raises:
            InputError: the texts of a sample are too long together.
        """
        if isinstance(value, dict):
            return {k: self.inserted(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.inserted(v) for v in value]
        text = self._texts.get(value.removeprefix("attachment://")) if isinstance(value, str) else None
        if not isinstance(text, str):
            return value
        self._left -= len(text)
        if self._left < 0:
            raise InputError(f"its attachments make more than {_LONGEST_MEMBER:,} characters")
        return text


def _judged(score: Any) -> bool | None:
    return {"C": True, "I": False, 1: True, 0: False}.get(score) if isinstance(score, str | int | float) else None
