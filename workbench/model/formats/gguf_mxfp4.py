"""Between the two orders in which MXFP4 is stored, exactly: published, and ggml's.

Published: byte i of a group of 32 values holds value 2i in its low and 2i + 1 in its high nibble; scales are a tensor
of their own. ggml: a block of 17 bytes, the scale first; byte j holds value j in its low and j + 16 in its high nibble.

Cost: 17 bytes read and written for each group; all steps are vector operations on pairs of bytes.
"""

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_ROWS = 2048  # groups at a time: their copies stay in cache
BLOCK_BYTES = 17


def from_ggml(blocks: Bytes, out: Bytes) -> None:
    """Reorder the nibbles of groups [row, group, 16] from ggml's order into `out` [row, group, 16]."""
    step = max(1, _ROWS // blocks.shape[1])
    for start in range(0, len(blocks), step):
        pairs = np.ascontiguousarray(blocks[start : start + step]).view("<u2")  # byte 2i, and byte 2i + 1 above it
        rows = out[start : start + step]
        rows[..., :8] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)  # values 0 to 15
        rows[..., 8:] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)  # values 16 to 31


def to_ggml(blocks: Bytes) -> Bytes:
    """Return groups [..., 16] in ggml's order."""
    low, high = blocks[..., :8], blocks[..., 8:]
    even = (low & 0x0F) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    return np.stack([even, odd], -1).reshape(blocks.shape)
