"""Read one safetensors file, whose header is validated before any tensor is used, or write one.

Reference: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.bounded_json import parse_json
from workbench.errors import InputError, refuse_lfs_pointer

_LARGEST_HEADER = 100_000_000
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "U32": 4, "I8": 1, "I64": 8, "I32": 4, "I16": 2, "BOOL": 1}

FLOATS = ("BF16", "F16", "F32")  # names of the dtypes of weights that are not packed


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of tensors, name → [...].

    Raises:
        OSError: the file cannot be written; safetensors raises an error of its own, which has the number in its text.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A validated file; tensors are memory-mapped and read when they are used."""

    path: Path
    entries: dict[str, Entry]
    header: bytes = field(repr=False)
    _mapped: Any = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and validate the header.

        Raises:
            InputError: the file is a git-lfs pointer, truncated, is not safetensors, or a tensor of it is invalid.
        """
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise InputError(f"{path} is not a file")
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                refuse_lfs_pointer(path, file.read(64))
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > _LARGEST_HEADER or 8 + length > size:
                    raise InputError(
                        f"{path}: a header of {length:,} bytes in a file of {size:,} bytes: truncated, or no "
                        "safetensors file"
                    )
                header = file.read(length)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        try:
            described = parse_json(header, object_pairs_hook=_no_duplicates)
            described.pop("__metadata__", None)
            entries = {name: _entry(value) for name, value in described.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: the header is not a safetensors header: {error!r}") from error
        _check_ranges(path, entries, size - 8 - length)
        try:
            mapped = safe_open(path, framework="pt")
        except SafetensorError as error:  # what the library asks beyond this: of metadata, of unicode
            raise InputError(f"{path}: the header is not a safetensors header: {error}") from error
        return cls(path, entries, header, mapped)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor [...] in its stored shape, memory-mapped."""
        tensor: Tensor = self._mapped.get_tensor(name)
        return tensor

    def samples(self, blocks: int = 64, block_bytes: int = 65_536) -> Iterator[bytes]:
        """Yield evenly spaced blocks of the file, or all of it if it is not larger than they are together."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            if size <= blocks * block_bytes:
                yield file.read()
                return
            for i in range(blocks):
                file.seek(i * (size - block_bytes) // (blocks - 1))
                yield file.read(block_bytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    (name, times), *_ = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"tensor {name!r} is stored twice")
    return dict(pairs)


def _entry(value: dict[str, Any]) -> Entry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} or offsets {start}, {end} are not valid counts")
    return Entry(str(value["dtype"]), shape, start, end)


def _check_ranges(path: Path, entries: dict[str, Entry], data_bytes: int) -> None:
    position, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        wanted = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
        if entry.dtype not in _BYTES:
            raise InputError(f"{path}: tensor {name!r} has dtype {entry.dtype}, which is not read here")
        if entry.end - entry.start != wanted:
            raise InputError(
                f"{path}: tensor {name!r} of shape {entry.shape} needs {wanted:,} bytes, has "
                f"{entry.end - entry.start:,}"
            )
        if entry.end > data_bytes:
            raise InputError(
                f"{path}: tensor {name!r} ends {entry.end - data_bytes:,} bytes beyond the file: truncated download?"
            )
        if entry.start != position:
            raise InputError(f"{path}: tensor {name!r} overlaps or leaves a gap after {previous or 'the header'!r}")
        position, previous = entry.end, name
    if position != data_bytes:
        raise InputError(
            f"{path}: {data_bytes - position:,} bytes after the last tensor belong to no tensor: the file is damaged"
        )
