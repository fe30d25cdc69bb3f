"""Unpack zstd with a limit of size: data that would unpack to more is refused before it is unpacked.

`unpack` reads one frame of a known size. `SizedZstd` is zarr's zstd codec with the same check, for the chunks that zarr
decompresses itself; importing this module makes zarr use it in this process.
"""

import asyncio
from typing import Any

import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec
from zarr.registry import register_codec

from workbench.errors import InputError

MAX_TEXT_BYTES = 2**30  # of a chunk of texts, whose size no layout states
_MAGIC = b"\x28\xb5\x2f\xfd"
_SIZE_BYTES = (0, 2, 4, 8)  # of the field with a frame's content size, by its flag
_DICTIONARY_BYTES = (0, 1, 2, 4)


class UnpackedSizeError(InputError):
    """A chunk that would unpack to another size than that of its values."""


def unpack(data: Any, size: int) -> np.ndarray:
    """Return the bytes that a zstd frame holds [size]; it must hold this many.

    Raises:
        UnpackedSizeError: it holds another number of bytes.
        ValueError: it is not a complete frame.
    """
    told = frame_size(data)
    if told != size:
        raise UnpackedSizeError(f"a chunk unpacks to {_count(told)} bytes, expected {size:,}")
    out = np.empty(size, dtype=np.uint8)
    if size:
        Zstd().decode(data, out=out)  # refuses a second frame, for which there is no room
    return out


def _count(size: int | None) -> str:
    return "an unknown number of" if size is None else f"{size:,}"


def frame_size(data: Any) -> int | None:
    """Return the number of bytes that a zstd frame unpacks to by its header, None if the header does not state it.

    Reference: RFC 8878, section 3.1.1.1.

    Raises:
        ValueError: the data do not begin with a frame header.
    """
    head = bytes(data[:18])
    if not head.startswith(_MAGIC) or len(head) < 6:
        raise ValueError("it is not a zstd frame")
    descriptor = head[4]
    flag, single_segment = descriptor >> 6, bool(descriptor & 0x20)
    length = 1 if flag == 0 and single_segment else _SIZE_BYTES[flag]
    start = 5 + (not single_segment) + _DICTIONARY_BYTES[descriptor & 3]
    if length == 0:
        return None
    if len(head) < start + length:
        raise ValueError("its zstd frame is truncated")
    return int.from_bytes(head[start : start + length], "little") + (256 if length == 2 else 0)


class SizedZstd(ZstdCodec):
    """zarr's zstd codec, which refuses a chunk that unpacks to more than its values."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        data = chunk_bytes.as_numpy_array()
        return chunk_spec.prototype.buffer.from_bytes(unpack(data, _size_within(data, chunk_spec)).tobytes())

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)


def _size_within(data: Any, spec: Any) -> int:
    """Return the number of bytes that a chunk unpacks to.

    Raises:
        UnpackedSizeError: it is larger than the chunk's values, or not told.
    """
    dtype = np.dtype(spec.dtype.to_native_dtype())
    size = frame_size(data)
    limit = MAX_TEXT_BYTES if dtype.kind in "OT" else int(np.prod(spec.shape, dtype=object)) * dtype.itemsize
    if size is None or size > limit:
        raise UnpackedSizeError(f"a chunk unpacks to {_count(size)} bytes, expected at most {limit:,}")
    return size


register_codec("zstd", SizedZstd, qualname=f"{SizedZstd.__module__}.{SizedZstd.__qualname__}")
zarr.config.set({"codecs.zstd": f"{SizedZstd.__module__}.{SizedZstd.__qualname__}"})
