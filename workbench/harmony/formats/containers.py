"""The objects in a file or folder: JSON Lines, JSON documents and arrays, Parquet, Arrow, gzip and zstd.

What a file is shows in its first bytes, not in its name. Nothing in a file is executed, and no name in it becomes a
path outside its folder.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workbench.bounded_json import parse_documents, parse_json, read_json
from workbench.errors import InputError

_LONGEST_DOCUMENT = 1_000_000_000  # bytes, unpacked
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BATCH_ROWS, _BATCH_BYTES = 256, 4_000_000_000

Objects = Iterator[tuple[str, Any]]


def objects(path: Path) -> tuple[str, Objects]:
    """Return the kind of a container, and its objects with their places; a bad line is a ValueError object."""
    if path.is_dir():
        return _folder(path)
    start, packed = _first_bytes(path)
    if packed:
        content = _unpacked(path, packed)
        return f"{packed}, JSON", _json(path, content)
    if start.startswith(b"PAR1"):
        return "Parquet", _parquet(path)
    if start.startswith(b"ARROW1"):
        return "Arrow", _arrow(path)
    if path.suffix == ".arrow":
        return "Arrow", _arrow(path)
    return "JSON", _json(path, None)


def _first_bytes(path: Path) -> tuple[bytes, str | None]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return start, next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def _unpacked(path: Path, compression: str) -> bytes:
    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            content: bytes = stream.read(_LONGEST_DOCUMENT + 1)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged: it does not unpack as {compression}") from error
    if len(content) > _LONGEST_DOCUMENT:
        raise InputError(f"{path} unpacks to more than {_LONGEST_DOCUMENT:,} bytes: split it")
    return content


def _json(path: Path, content: bytes | None) -> Objects:
    """Objects of JSON Lines, of an array, or of documents one after the other."""
    file = path.open("rb") if content is None else io.BytesIO(content)
    with file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        file.seek(0)
        if _is_object(first):
            yield from _lines(file)
            return
        if content is None and path.stat().st_size > _LONGEST_DOCUMENT:
            raise InputError(f"{path} has more than {_LONGEST_DOCUMENT:,} bytes in one document: use JSON Lines")
        yield from _documents(path, file.read())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except InputError:
        return False


def _lines(file: Any) -> Objects:
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            try:
                yield f"line {number}", parse_json(text)
            except InputError as error:
                yield f"line {number}", error


def _documents(path: Path, content: bytes) -> Objects:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    documents, number = parse_documents(text), 1
    while True:
        try:
            value = next(documents)
        except StopIteration:
            return
        except InputError as error:
            if number == 1:
                raise InputError(f"{path}: {error}") from error
            yield f"document {number}", error
            return
        if isinstance(value, list):
            yield from ((f"entry {i}", each) for i, each in enumerate(value, 1))
        else:
            yield f"document {number}", value
        number += 1


def _parquet(path: Path) -> Objects:
    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(_rows_of_a_batch(path, file.metadata)))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is no complete Parquet file: {_line(error)}") from error


def _rows_of_a_batch(path: Path, metadata: pq.FileMetaData) -> int:
    """Return as many rows as fit in memory although each may repeat the longest value of the file.

    Raises:
        InputError: a column of a row group unpacks to more bytes than a document may have.
    """
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    sizes = (group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))
    largest = max(sizes, default=0)
    if largest > _LONGEST_DOCUMENT:
        raise InputError(f"{path} unpacks to {largest:,} bytes in one column: write it in smaller row groups")
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))


def _arrow(path: Path) -> Objects:
    try:
        with pa.memory_map(str(path)) as source:
            try:
                yield from _batches(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                source.seek(0)
                reader = pa.ipc.open_file(source)
                yield from _batches(reader.get_batch(i) for i in range(reader.num_record_batches))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is no complete Arrow file: {_line(error)}") from error


def _batches(batches: Any) -> Objects:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


def _folder(path: Path) -> tuple[str, Objects]:
    """A folder that `datasets` saved, or one of Parquet or JSON Lines files."""
    if (path / "state.json").exists():
        return "a saved dataset", _saved(path)
    if (path / "dataset_dict.json").exists():
        splits = [path / name for name in _names(path / "dataset_dict.json", "splits")]
        return "a saved dataset", _joined(splits)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl", ".arrow"))
    if not files:
        raise InputError(f"{path} is a folder without a saved dataset, Parquet or JSON Lines files")
    return "a folder of files", _joined(files)


def _saved(path: Path) -> Objects:
    for entry in _names(path / "state.json", "_data_files"):
        yield from _arrow(path / entry)


def _joined(paths: list[Path]) -> Objects:
    for path in paths:
        for where, value in objects(path)[1]:
            yield f"{path.name}, {where}", value


def _names(path: Path, field: str) -> list[str]:
    """File names in a description of a dataset, none of which may lead elsewhere."""
    try:
        entries = read_json(path)[field]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a dataset: {_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise InputError(f"{path} names {ascii(name)[:60]}, which is no file beside it")
    return names


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
