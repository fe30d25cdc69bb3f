"""The objects in a file or folder: JSON Lines, JSON documents and arrays, Parquet, Arrow, gzip and zstd.

What a file is shows in its first bytes, not in its name. Nothing in a file is executed, and no name in it becomes a
path outside its folder.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workbench.bounded_json import parse_documents, parse_json, read_json, unique_names
from workbench.errors import InputError
from workbench.harmony.formats import parquet_pages
from workbench.harmony.formats.arrow_messages import largest_unpacked
from workbench.harmony.transcripts import LONGEST_ROW_BYTES
from workbench.inputs import open_regular

_LONGEST_DOCUMENT = 1_000_000_000  # bytes, unpacked
MAX_ROWS = 10_000_000  # of a file: columns of one value repeated take a few bytes for any number of rows
_MAX_COLUMNS = 10_000  # of a table, counting those of nested values
_MAX_VALUES = 100_000_000  # of a row group or batch, those of nested lists included; they take gigabytes as objects
_VALUE_BYTES = 8  # of a value as an entry of a list
_ARROW_MARK = b"ARROW1\0\0"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".arrow")  # of the files that are read in a folder
_DESCRIPTIONS = (".md", ".txt", ".yaml", ".yml", "")  # of files about the others
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
        with open_regular(path) as file:  # a folder of files may hold a pipe
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
    """Yield objects of JSON Lines, of an array, or of documents one after the other."""
    file = path.open("rb") if content is None else io.BytesIO(content)
    with file:
        first = file.readline(LONGEST_ROW_BYTES).removeprefix(b"\xef\xbb\xbf")
        while first and not first.strip():
            first = file.readline(LONGEST_ROW_BYTES)
        file.seek(0)
        if _is_object(first):
            yield from _lines(path, file)
            return
        if content is None and path.stat().st_size > _LONGEST_DOCUMENT:
            raise InputError(f"{path} has more than {_LONGEST_DOCUMENT:,} bytes in one document: use JSON Lines")
        yield from _documents(path, file.read())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except InputError:
        return False


def _lines(path: Path, file: Any) -> Objects:
    number = 0
    while line := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if len(line) > LONGEST_ROW_BYTES:
            raise InputError(f"{path}, line {number} has more than {LONGEST_ROW_BYTES:,} bytes: split it")
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            try:
                yield f"line {number}", parse_json(text, object_pairs_hook=unique_names)
            except InputError as error:
                yield f"line {number}", error


def _documents(path: Path, content: bytes) -> Objects:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    documents, number = parse_documents(text, object_pairs_hook=unique_names), 1
    while True:
        try:
            value = next(documents)
        except StopIteration:
            return
        except InputError as error:
            if number == 1:
                raise InputError(f"{path}: {error}") from error
            yield f"document {number} and what follows", error
            return
        if isinstance(value, list):
            yield from ((f"entry {i}", entry) for i, entry in enumerate(value, 1))
        else:
            yield f"document {number}", value
        number += 1


def _parquet(path: Path) -> Objects:
    with _complete(path, "Parquet"), pq.ParquetFile(path) as file:
        metadata = file.metadata
        _refuse_large(path, metadata.num_rows, metadata.num_columns)
        with pa.memory_map(str(path)) as source:
            groups = parquet_pages.unpacked(memoryview(source.read_buffer()).cast("B"), metadata)
        if (largest := max((group.size for group in groups), default=0)) > _LONGEST_DOCUMENT:
            raise InputError(f"{path} unpacks to {largest:,} bytes in one row group: write it in smaller ones")
        if (values := max((group.values for group in groups), default=0)) > _MAX_VALUES:
            raise InputError(f"{path} has {values:,} values in one row group: write it in smaller ones")
        yield from _rows(path, file.iter_batches(_rows_at_once(largest)))


@contextmanager
def _complete(path: Path, kind: str) -> Iterator[None]:
    """Make every error of reading a table an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # ValueError: a date that Python lacks
        raise InputError(f"{path} is not a complete {kind} file: {_line(error)}") from error


def _rows_at_once(size: int) -> int:
    """Return how many rows fit in memory if each repeats the longest value of a batch of `size` bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, size)))


def _refuse_large(path: Path, rows: int, columns: int) -> None:
    if not 0 <= rows <= MAX_ROWS or columns > _MAX_COLUMNS:
        raise InputError(
            f"{path} has {rows:,} rows of {columns:,} columns, expected at most {MAX_ROWS:,} rows of "
            f"{_MAX_COLUMNS:,} columns: split it"
        )


def _arrow(path: Path) -> Objects:
    with _complete(path, "Arrow"):
        open_regular(path).close()  # no pipe, which would wait for ever
        with pa.memory_map(str(path)) as source:
            # a file is a stream between two marks; its footer, which could name other places, is not read
            begin = len(_ARROW_MARK) if source.read(len(_ARROW_MARK)) == _ARROW_MARK else 0
            source.seek(begin)
            if (largest := largest_unpacked(source)) > _LONGEST_DOCUMENT:
                raise InputError(f"{path} unpacks to {largest:,} bytes in one batch: write it in smaller ones")
            source.seek(begin)
            yield from _rows(path, pa.ipc.open_stream(source))


def _rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Objects:
    """Yield the rows of batches, after a check of what each batch holds.

    Raises:
        InputError: there are too many rows or columns.
        pa.ArrowInvalid: values lie outside of the file, or texts are not UTF-8.
    """
    number = 0
    for batch in batches:
        _refuse_large(path, number + batch.num_rows, batch.num_columns)
        batch.validate(full=True)
        if (values := sum(map(_values, batch.columns))) > _MAX_VALUES:
            raise InputError(f"{path} has {values:,} values in one batch: write it in smaller ones")
        step = _rows_at_once(max(batch.nbytes, _VALUE_BYTES * values))
        for start in range(0, batch.num_rows, step):
            for row in batch.slice(start, step).to_pylist():
                number += 1
                yield f"row {number}", row


def _values(array: pa.Array) -> int:
    """Return how many values a column has with those inside of it: values without content take no bytes of a file."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _values(array.storage)
    if pa.types.is_dictionary(kind):
        return len(array) + _values(array.dictionary)
    if pa.types.is_run_end_encoded(kind) or pa.types.is_map(kind) or hasattr(array, "values"):
        return len(array) + _values(array.values)
    if pa.types.is_struct(kind) or pa.types.is_union(kind):
        return len(array) + sum(_values(array.field(i)) for i in range(kind.num_fields))
    return len(array)


def _folder(path: Path) -> tuple[str, Objects]:
    """Return a folder that `datasets` saved, or one of Parquet or JSON Lines files."""
    if (path / "state.json").exists():
        return "a saved dataset", _saved(path)
    if (path / "dataset_dict.json").exists():
        splits = [path / name for name in _names(path / "dataset_dict.json", "splits")]
        return "a saved dataset", _joined(splits)
    files = sorted(file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and not file.is_dir())
    if not any(_suffix(file) in _SUFFIXES for file in files):
        raise InputError(f"{path} is a folder without a saved dataset, Parquet or JSON Lines files")
    return "a folder of files", _joined([file for file in files if _suffix(file) not in _DESCRIPTIONS])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix(path: Path) -> str:
    """Return the last part of a name in lower case, without that of a packed file: .jsonl of rows.jsonl.gz."""
    name = path.name.lower()
    for packed in (".gz", ".zst", ".zstd"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def _saved(path: Path) -> Objects:
    for entry in _names(path / "state.json", "_data_files"):
        yield from _arrow(path / entry)


def _joined(paths: list[Path]) -> Objects:
    for path in paths:
        if path.is_file() and _suffix(path) not in _SUFFIXES:
            yield path.name, InputError("it is read alone, not in a folder, if it is a file of conversations")
            continue
        for where, value in objects(path)[1]:
            yield f"{path.name}, {where}", value


def _names(path: Path, field: str) -> list[str]:
    """Return file names in a description of a dataset, none of which may lead elsewhere."""
    try:
        entries = read_json(path)[field]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a dataset: {_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise InputError(f"{path} names {ascii(name)[:60]}, which is not a file in its folder")
    return names


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
