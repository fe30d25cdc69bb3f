"""Read one GGUF file: its metadata, and its tensors as memory-mapped bytes. Everything is validated before it is used.

A file is the magic "GGUF", a version, counts, key-value metadata, tensor descriptions and, aligned, the data.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import itertools
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from workbench.errors import InputError, refuse_lfs_pointer

MAGIC = b"GGUF"
_MOST_ITEMS = 100_000_000  # a guard against counts that no file holds
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
MXFP4, OLLAMA_MXFP4 = 39, 4  # ggml's type, and the number that Ollama used before ggml had one
_MOST_AXES = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: ggml's type number, shape with the fastest axis last, and its bytes."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A validated file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header: bytes = field(repr=False)
    _mapped: Any = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read and validate the header.

        Raises:
            InputError: the file is a git-lfs pointer, truncated, damaged or no GGUF file.
        """
        try:
            if not path.is_file():
                raise InputError(f"{path} is not a file")
            with path.open("rb") as file:
                beginning = file.read(64)
            refuse_lfs_pointer(path, beginning)
            if not beginning.startswith(MAGIC):
                raise InputError(
                    f"{path} does not begin with GGUF: it is not a GGUF file, or an incomplete download; "
                    "download it again"
                )
            # copy on write: torch requires writable memory, and nothing is written
            mapped = np.memmap(path, dtype=np.uint8, mode="c")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return _parse(path, mapped)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise InputError(f"{path}: the GGUF header is truncated or damaged ({error})") from error

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor [byte], memory-mapped."""
        tensor = self.tensors[name]
        data: npt.NDArray[np.uint8] = self._mapped[tensor.start : tensor.start + tensor.size]
        return data

    def release(self, name: str) -> None:
        """Tell the system that the bytes of a tensor are not needed soon; they can be read from the file again.

        Mapped pages that were read count as memory of the process until then.
        """
        tensor, page = self.tensors[name], mmap.PAGESIZE
        start, stop = -(-tensor.start // page) * page, (tensor.start + tensor.size) // page * page
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED, start, stop - start)


class _Cursor:
    """Reads values one after another from mapped bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Return texts that follow each other; in one loop, as a vocabulary and its merges are 650,000 of them."""
        data, at, unpack, texts = self.data, self.at, _LENGTH.unpack_from, []
        for _ in range(count):
            start = at + _LENGTH.size
            at = start + unpack(data, at)[0]
            if at > len(data):
                raise struct.error(f"a text of {at - start:,} bytes")
            texts.append(str(data[start:at], "utf-8", "surrogateescape"))
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if count > _MOST_ITEMS or inner == _ARRAY:
            raise struct.error(f"an array of {count:,} items of type {inner}")
        if inner == _STRING:
            return self.texts(count)
        values = struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{_SCALARS[inner]}")
        return list(values)


def _parse(path: Path, mapped: Any) -> GgufFile:
    cursor = _Cursor(memoryview(mapped))
    cursor.at = len(MAGIC)
    version, n_tensors, n_values = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} is not read, only 2 and 3 (little-endian)")
    if max(n_tensors, n_values) > _MOST_ITEMS:
        raise struct.error(f"{n_tensors:,} tensors and {n_values:,} values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.scalar("I"))
    described = [_described(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise InputError(f"{path}: general.alignment is {alignment!r}, expected a number of bytes")
    data = -(-cursor.at // alignment) * alignment
    old_types = metadata.get("general.architecture") == "gptoss"
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in described:
        if name in tensors:
            raise InputError(f"{path}: tensor {name!r} is stored twice")
        tensor = GgufTensor(kind, shape, data + offset, _size(path, name, kind, shape, old_types))
        if tensor.start + tensor.size > len(mapped):
            missing = tensor.start + tensor.size - len(mapped)
            raise InputError(f"{path}: tensor {name!r} ends {missing:,} bytes beyond the file: truncated download?")
        tensors[name] = tensor
    _refuse_overlaps(path, tensors)
    return GgufFile(path, metadata, tensors, bytes(mapped[: cursor.at]), mapped)


def _refuse_overlaps(path: Path, tensors: dict[str, GgufTensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda item: item[1].start)
    for (name, tensor), (following, other) in itertools.pairwise(ordered):
        if tensor.start + tensor.size > other.start:
            raise InputError(
                f"{path}: tensors {name!r} and {following!r} overlap: the file is damaged, download it again"
            )


def _described(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, axes = cursor.text(), cursor.scalar("I")
    if not 1 <= axes <= _MOST_AXES:
        raise struct.error(f"a tensor of {axes} axes")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]  # ggml names the fastest axis first
    return name, cursor.scalar("I"), shape, cursor.scalar("Q")


def _size(path: Path, name: str, kind: int, shape: tuple[int, ...], old_types: bool) -> int:
    """Return the bytes of a tensor."""
    block, size = block_and_bytes(kind, old_types) or (0, 0)
    if not block or not (kind in (MXFP4, OLLAMA_MXFP4) or _is_decoded(kind, size)):
        raise InputError(f"{path}: tensor {name!r} has ggml type {kind}, which is not read here")
    if shape[-1] % block:
        raise InputError(f"{path}: tensor {name!r} of shape {list(shape)} has rows that are not a multiple of {block}")
    return math.prod(shape) // block * size


def block_and_bytes(kind: int, old_types: bool = False) -> tuple[int, int] | None:
    """Return the values of a block and its bytes, or None for an unknown type."""
    import gguf  # late: only GGUF files need it

    if old_types and kind == OLLAMA_MXFP4:
        kind = MXFP4
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return None


@functools.lru_cache
def _is_decoded(kind: int, size: int) -> bool:
    """Return whether the package gguf reads a type; it lists the sizes of others too. size: bytes of a block."""
    try:
        decoder(kind)(np.zeros((1, size), dtype=np.uint8))
    except (NotImplementedError, ValueError):
        return False
    return True


def precision(kind: int) -> str:
    """Return the name of a ggml type as the workbench reports it."""
    import gguf

    return "MXFP4" if kind == OLLAMA_MXFP4 else gguf.GGMLQuantizationType(kind).name


def decoder(kind: int) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Return the function from the bytes of rows [..., bytes] to float32 values [..., values]."""
    import gguf

    return lambda data: gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind))
