"""Small chunks that unpack to gigabytes."""

import json
from pathlib import Path

import google_crc32c
import numpy as np

_BLOCK = 2**17  # the largest block of zstd


def bomb(size: int, *, claimed: int | None = -1) -> bytes:
    """Return a zstd frame of this many zeros, 4 bytes for 128 KiB. claimed: its size by the header, or None."""
    claimed = size if claimed == -1 else claimed
    descriptor, field = (0, b"") if claimed is None else (0xC0, (claimed % 2**64).to_bytes(8, "little"))
    window = (7 << 3).to_bytes(1, "little")  # 128 KiB
    count = size // _BLOCK
    blocks = [(_BLOCK << 3 | 1 << 1 | (i == count - 1)).to_bytes(3, "little") + b"\0" for i in range(count)]
    return b"\x28\xb5\x2f\xfd" + descriptor.to_bytes(1, "little") + window + field + b"".join(blocks)


def plant(run: Path, array: str, packed: bytes) -> None:
    """Put a frame instead of every chunk of the first file of an array, in its shard if it has shards."""
    about = json.loads((run / array / "zarr.json").read_bytes())
    file = next(path for path in sorted((run / array / "c").rglob("*")) if path.is_file())
    inner = [codec["configuration"] for codec in about["codecs"] if codec["name"] == "sharding_indexed"]
    if not inner:
        file.write_bytes(packed)
        return
    shard = about["chunk_grid"]["configuration"]["chunk_shape"]
    n = int(np.prod([a // b for a, b in zip(shard, inner[0]["chunk_shape"], strict=True)]))
    index = np.tile(np.array([0, len(packed)], dtype="<u8"), n).tobytes()
    file.write_bytes(packed + index + google_crc32c.value(index).to_bytes(4, "little"))
