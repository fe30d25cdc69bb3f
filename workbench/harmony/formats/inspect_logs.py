"""Evaluation logs of Inspect: a zip of JSON (.eval) or one JSON document (.json).

Members of the zip may be compressed by zstd, which Python's own zipfile does not read before 3.14. A log of a run that
did not end has its header in a journal.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.harmony.formats.conversation import Conversation, error_text

_ZSTD = 93
_LONGEST_MEMBER = 200_000_000  # bytes, unpacked
_CUT = ("max_tokens", "model_length", "length")


def is_zip(path: Path) -> bool:
    """Return whether a file starts as a zip does."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def is_log(document: Any) -> bool:
    """Return whether a JSON document is a log of Inspect."""
    return isinstance(document, Mapping) and {"eval", "samples"} <= document.keys() and "version" in document


def read_zip(path: Path) -> Iterator[tuple[str, Conversation]]:
    """Return the conversations of an .eval file.

    Raises:
        InputError: the file is a zip archive but not a complete Inspect log.
    """
    try:
        with zipfile.ZipFile(path) as log:
            names = log.namelist()
            header = parse_json(_member(log, "header.json" if "header.json" in names else "_journal/start.json"))
            for name in sorted(n for n in names if n.startswith("samples/") and n.endswith(".json")):
                yield name, from_sample(parse_json(_member(log, name)), header)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is a zip, but not a complete Inspect log: {error_text(error)}") from error


def read_document(log: Mapping[str, Any]) -> Iterator[tuple[str, Conversation]]:
    """Yield the conversations of a log in one document."""
    for number, sample in enumerate(log.get("samples") or [], 1):
        yield f"sample {number}", from_sample(sample, log)


def _member(log: zipfile.ZipFile, name: str) -> bytes:
    info = log.getinfo(name)
    if info.file_size > _LONGEST_MEMBER:
        raise ValueError(f"{name} unpacks to {info.file_size:,} bytes")
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
    """Return the one sample of a log as a conversation."""
    evaluation, plan = log.get("eval") or {}, log.get("plan") or {}
    config = {**(evaluation.get("model_generate_config") or {}), **(plan.get("config") or {})}
    attachments = sample.get("attachments") or {}
    scores = [score.get("value") for score in (sample.get("scores") or {}).values() if isinstance(score, dict)]
    target = sample.get("target")
    calls = [event for event in sample.get("events") or [] if isinstance(event, dict) and event.get("event") == "model"]
    choices = (sample.get("output") or {}).get("choices") or [{}]
    meta = {"task": str(evaluation.get("task", "")), **(sample.get("metadata") or {})}
    meta |= {"model": evaluation.get("model", ""), "source": "inspect", "scores": sample.get("scores") or {}}
    return Conversation(
        id=f"{sample['id']}/{sample.get('epoch', 1)}",
        prompt_id=str(sample["id"]),
        effort=config.get("reasoning_effort"),
        messages=[_attached(message, attachments) for message in sample["messages"]],
        options={"tools": _attached(calls[0].get("tools"), attachments)} if calls and calls[0].get("tools") else {},
        complete=False if choices[0].get("stop_reason") in _CUT else None,
        answer=target if isinstance(target, str) else None,
        correct=_judged(scores[0]) if scores else None,
        meta=meta,
    )


def _attached(value: Any, attachments: Mapping[str, str]) -> Any:
    """Long texts are kept aside in a log and named by their digest."""
    if isinstance(value, dict):
        return {k: _attached(v, attachments) for k, v in value.items()}
    if isinstance(value, list):
        return [_attached(v, attachments) for v in value]
    return attachments.get(value.removeprefix("attachment://"), value) if isinstance(value, str) else value


def _judged(score: Any) -> bool | None:
    return {"C": True, "I": False, 1: True, 0: False}.get(score) if isinstance(score, str | int | float) else None
