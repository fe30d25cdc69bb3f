"""Conversations in other programs' files, as transcripts: Inspect's evaluation logs, and JSON Lines of messages.

Which it is shows in the content, not in the name. An Inspect log is a zip of JSON (.eval) or one JSON document; its
members may be compressed by zstd, which Python's own zipfile does not read before 3.14.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.harmony.hosts import answers
from workbench.harmony.rendering import EFFORTS, check_messages, shown

_ZSTD = 93
_LONGEST_MEMBER = 200_000_000  # bytes, unpacked
_LONGEST_DOCUMENT = 2_000_000_000


def convert(path: str | Path, *, effort: str | None = None) -> tuple[str, list[dict[str, Any]], list[str]]:
    """What the file is, a transcript row for each conversation in it, and why others were left out.

    effort: of conversations that do not say theirs.
    """
    path = Path(path)
    if effort is not None and effort not in EFFORTS:
        raise InputError(f"--effort {effort}: choose from {', '.join(EFFORTS)}")
    kind, found = _conversations(path)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for where, conversation in found:
        try:
            if isinstance(conversation, Exception):
                raise conversation
            row = _row(conversation, effort)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair could not be written
        except (InputError, answers.NoAnswerError, KeyError, TypeError, ValueError) as error:
            left_out.append(f"{where}: {_said(error)}")
        else:
            rows.append(row)
    return kind, _distinct(rows), left_out


def _said(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose id another has too get its count behind it."""
    seen: dict[str, int] = {}
    for row in rows:
        n = seen[row["id"]] = seen.get(row["id"], 0) + 1
        row["id"] += f"/{n}" if n > 1 else ""
    return rows


def _conversations(path: Path) -> tuple[str, Iterator[tuple[str, Any]]]:
    try:
        with path.open("rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"PK"):
        return "an Inspect log", _inspect_zip(path)
    if not start.startswith(b"{"):
        raise InputError(
            f"{path} is no file of conversations: wanted an Inspect log (.eval, .json), or JSON Lines with messages, or "
            "with prompt, reasoning and answer"
        )
    try:
        json.loads(start.splitlines()[0])
    except ValueError:  # a document over several lines, or a first line longer than what was read
        if path.stat().st_size <= _LONGEST_DOCUMENT and b'"eval"' in start and b'"version"' in start:
            return "an Inspect log", _inspect_document(path)
    return "JSON Lines", _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", _from_line(json.loads(line), number)
                except (ValueError, InputError, answers.NoAnswerError) as error:
                    yield f"line {number}", ValueError(_said(error))


def _from_line(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"the row is {shown(row)}; wanted an object")
    id = str(row.get("id", number))
    about = {
        "id": id,
        "prompt_id": str(row.get("prompt_id", id)),
        "effort": row.get("effort", row.get("reasoning_effort")),
    }
    about |= {
        "answer": row.get("target"),
        "correct": row.get("correct"),
        "meta": row.get("meta") or row.get("metadata") or {},
    }
    if isinstance(row.get("messages"), list):
        return about | {"messages": row["messages"]}
    reply = next((row[k] for k in ("answer", "response", "completion", "output") if isinstance(row.get(k), str)), None)
    if not isinstance(row.get("prompt"), str) or reply is None:
        raise InputError("the row has neither messages nor a prompt and an answer")
    reasoning = next(
        (row[k] for k in ("reasoning", "reasoning_content", "thinking") if isinstance(row.get(k), str)), ""
    )
    question = {"role": "user", "content": row["prompt"]}
    return about | {"messages": [question, {"role": "assistant", "content": reply, "reasoning": reasoning}]}


def _inspect_zip(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(path) as log:
            header = json.loads(_member(log, "header.json"))
            for name in sorted(n for n in log.namelist() if n.startswith("samples/") and n.endswith(".json")):
                yield name, _from_inspect(json.loads(_member(log, name)), header)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is a zip, but no whole Inspect log: {_said(error)}") from error


def _member(log: zipfile.ZipFile, name: str) -> bytes:
    info = log.getinfo(name)
    if info.file_size > _LONGEST_MEMBER:
        raise ValueError(f"{name} unpacks to {info.file_size:,} bytes")
    if info.compress_type != _ZSTD:
        return log.read(name)
    from numcodecs import Zstd

    assert log.fp is not None
    log.fp.seek(info.header_offset + 26)
    lengths = log.fp.read(4)  # of the name and the extra field, which stand before the data
    log.fp.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
    unpacked: bytes = Zstd().decode(log.fp.read(info.compress_size))
    if len(unpacked) != info.file_size:
        raise ValueError(f"{name} is damaged")
    return unpacked


def _inspect_document(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        log = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no whole Inspect log: {error}") from error
    for number, sample in enumerate(log.get("samples") or []):
        yield f"sample {number + 1}", _from_inspect(sample, log)


def _from_inspect(sample: Mapping[str, Any], log: Mapping[str, Any]) -> dict[str, Any]:
    evaluation, plan = log.get("eval", {}), log.get("plan", {})
    config = {**evaluation.get("model_generate_config", {}), **plan.get("config", {})}
    attachments = sample.get("attachments") or {}
    scores = [score.get("value") for score in (sample.get("scores") or {}).values() if isinstance(score, dict)]
    target = sample.get("target")
    meta = {"task": str(evaluation.get("task", "")), **(sample.get("metadata") or {})}
    meta |= {"model": evaluation.get("model", ""), "source": "inspect", "scores": sample.get("scores") or {}}
    return {
        "id": f"{sample['id']}/{sample.get('epoch', 1)}",
        "prompt_id": str(sample["id"]),
        "effort": config.get("reasoning_effort"),
        "messages": [_attached(message, attachments) for message in sample["messages"]],
        "answer": target if isinstance(target, str) else None,
        "correct": _judged(scores[0]) if scores else None,
        "meta": meta,
    }


def _attached(value: Any, attachments: Mapping[str, str]) -> Any:
    """Long texts are kept aside in a log and named by their digest."""
    if isinstance(value, dict):
        return {k: _attached(v, attachments) for k, v in value.items()}
    if isinstance(value, list):
        return [_attached(v, attachments) for v in value]
    return attachments.get(value.removeprefix("attachment://"), value) if isinstance(value, str) else value


def _judged(score: Any) -> bool | None:
    return {"C": True, "I": False, 1: True, 0: False}.get(score) if isinstance(score, str | int | float) else None


def _row(conversation: dict[str, Any], effort: str | None) -> dict[str, Any]:
    found = conversation["effort"] or effort
    if found not in EFFORTS:
        raise InputError(f"its effort is {shown(found)}: give --effort for conversations without one of their own")
    verbatim, messages = True, []
    for message in conversation["messages"]:
        written, own = _harmony(message)
        messages += written
        verbatim = verbatim and own
    check_messages(messages)
    if not any(m["role"] == "assistant" for m in messages):
        raise InputError("nothing was answered")
    thought = any(m.get("channel") == "analysis" for m in messages)
    meta = conversation["meta"] | {"reasoning": ("verbatim" if verbatim else "summary") if thought else "absent"}
    row = conversation | {"effort": found, "messages": messages, "meta": meta}
    return {k: v for k, v in row.items() if v is not None}


def _harmony(message: Any) -> tuple[list[dict[str, Any]], bool]:
    """A message of any of these programs as harmony has it; whether its reasoning is the model's own words."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"a message is {shown(message)}; wanted an object with a role")
    role, content = message["role"], message.get("content")
    text = _parts(content, "text")
    if role == "tool":
        name = message.get("name") or message.get("function") or "tool"
        return [
            {
                "role": "tool",
                "name": name if "." in name else f"functions.{name}",
                "channel": "commentary",
                "content": text,
            }
        ], True
    if role != "assistant":
        return [{"role": role, "content": text}], True
    if message.get("channel"):
        return [
            {
                k: v
                for k, v in message.items()
                if k in ("role", "content", "channel", "recipient", "content_type", "name")
            }
        ], True
    reasoning = message.get("reasoning_content") or message.get("reasoning") or _parts(content, "reasoning")
    own = not (
        isinstance(content, Sequence)
        and any(isinstance(p, dict) and (p.get("redacted") or p.get("summary")) for p in content)
    )
    found = [{"role": "assistant", "channel": "analysis", "content": reasoning}] if reasoning else []
    if reasoning or not text:
        found += [{"role": "assistant", "channel": "final", "content": text}] if text else []
    else:
        found, _ = answers.split(text)
    calls = message.get("tool_calls") or []
    for call in calls:
        named = call.get("function") if isinstance(call, dict) else None
        wrapped = (
            call if isinstance(named, dict) else {"function": {"name": named, "arguments": call.get("arguments", "")}}
        )
        found.append(answers.call(wrapped))
    return found, own


def _parts(content: Any, kind: str) -> str:
    """The texts of this kind: a plain content is text."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts: Sequence[Any] = content if isinstance(content, list) else []
    return "".join(str(p.get(kind, "")) for p in parts if isinstance(p, dict) and p.get("type") == kind)
