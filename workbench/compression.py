"""zstd with a limit: a few bytes that unpack to gigabytes are refused before they are unpacked.

`unpack` reads one frame of a known size. `SizedZstd` is zarr's zstd codec with the same check, for the chunks that zarr
decompresses itself; importing this module makes zarr use it in this process.
"""

from typing import Any

import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec
from zarr.registry import register_codec

MAX_TEXT_BYTES = 2**30  # of a chunk of texts, whose size no layout tells
_MAGIC = b"\x28\xb5\x2f\xfd"
_SIZE_BYTES = (0, 2, 4, 8)  # of the field with a frame's content size, by its flag
_DICTIONARY_BYTES = (0, 1, 2, 4)


def unpack(data: bytes, size: int) -> bytes:
    """Return what a zstd frame holds, which has this size in bytes.

    Raises:
        ValueError: it is no complete frame, or holds another number of bytes.
    """
    if frame_size(data) != size:
        raise ValueError(f"it unpacks to {frame_size(data)} bytes instead of {size:,}")
    unpacked: bytes = Zstd().decode(data)
    return unpacked


def frame_size(data: bytes) -> int | None:
    """Return the number of bytes that a zstd frame unpacks to by its header, None if the header does not tell.

    Reference: RFC 8878, section 3.1.1.1.

    Raises:
        ValueError: the data do not begin with a frame header.
    """
    head = bytes(data[:18])
    if not head.startswith(_MAGIC) or len(head) < 6:
        raise ValueError("it is no zstd frame")
    descriptor = head[4]
    flag, single_segment = descriptor >> 6, bool(descriptor & 0x20)
    length = 1 if flag == 0 and single_segment else _SIZE_BYTES[flag]
    start = 5 + (not single_segment) + _DICTIONARY_BYTES[descriptor & 3]
    if length == 0:
        return None
    if len(head) < start + length:
        raise ValueError("its zstd frame is cut off")
    return int.from_bytes(head[start : start + length], "little") + (256 if length == 2 else 0)


class SizedZstd(ZstdCodec):  # type: ignore[misc]  # zarr is not typed
    """zarr's zstd codec, which refuses a chunk that unpacks to more than its values."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _refuse_larger(chunk_bytes, chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:  # of versions without `_decode_sync`
        _refuse_larger(chunk_bytes, chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


def _refuse_larger(chunk: Any, spec: Any) -> None:
    """Check the size that a chunk unpacks to.

    Raises:
        ValueError: it is larger than the chunk's values, or not told.
    """
    dtype = np.dtype(spec.dtype.to_native_dtype())
    is_text = dtype.kind in "OT"
    limit = MAX_TEXT_BYTES if is_text else int(np.prod(spec.shape, dtype=object)) * dtype.itemsize
    size = frame_size(chunk.as_numpy_array()[:18].tobytes())
    if size is None or size > limit:
        told = "an unknown number of" if size is None else f"{size:,}"
        raise ValueError(f"a chunk unpacks to {told} bytes, expected at most {limit:,}")


register_codec("zstd", SizedZstd, qualname=f"{SizedZstd.__module__}.{SizedZstd.__qualname__}")
zarr.config.set({"codecs.zstd": f"{SizedZstd.__module__}.{SizedZstd.__qualname__}"})
