"""Parquet files whose metadata claim less than their pages hold."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift's compact protocol writes it, with at least this many bytes."""
    number = (number << 1) ^ (number >> 63)
    content = bytearray()
    while number >= 128:
        content.append(number & 127 | 128)
        number >>= 7
    content.append(number)
    while len(content) < length:
        content[-1] |= 128
        content.append(0)
    return bytes(content)


def with_claimed_sizes(path: Path, claimed: int) -> None:
    """Change the unpacked sizes in the metadata at the end of a file; its pages stay as they are."""
    content, metadata = path.read_bytes(), pq.read_metadata(path)
    end = int.from_bytes(content[-8:-4], "little")
    pages, footer = content[: -8 - end], content[-8 - end : -8]
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        columns = [group.column(i).total_uncompressed_size for i in range(group.num_columns)]
        for size in {*columns, group.total_byte_size}:
            right = varint(size)
            footer = footer.replace(right, varint(claimed, len(right)))
    path.write_bytes(pages + footer + content[-8:])


def write_lie(path: Path, size: int, columns: int = 1) -> None:
    """Write a file of one row, which claims 999 bytes, and whose pages unpack to `size` bytes a column."""
    text = pa.array(["x" * size])
    options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
    pq.write_table(pa.table({f"c{i}": text for i in range(columns)}), path, **options)
    with_claimed_sizes(path, 999)
    group = pq.read_metadata(path).row_group(0)
    assert [group.column(i).total_uncompressed_size for i in range(columns)] == [999] * columns
