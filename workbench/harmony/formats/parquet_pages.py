"""What the pages of a Parquet file unpack to, by the header before each page.

Readers allocate what a page's header claims, not what the metadata at the end of the file states, and both may lie. The
headers are read without unpacking a page: they are Thrift structs in the compact protocol.

Reference: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from typing import Any, NamedTuple

import pyarrow.parquet as pq

MAX_PAGES = 1_000_000  # of a file: a page may take a few bytes and hold nothing
_MAX_DEPTH = 8  # of a header
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
# fields of a page header: its sizes, and the structs of its kind, in which the first field is the number of values
_UNPACKED, _PACKED, _DATA, _DATA_V2 = 2, 3, 5, 8


class Unpacked(NamedTuple):
    """What the pages of a row group unpack to. values: levels too, which take no bytes where a value repeats."""

    size: int  # bytes
    values: int


def unpacked(content: memoryview, metadata: pq.FileMetaData) -> list[Unpacked]:
    """Return what each row group of a file unpacks to.

    Raises:
        ValueError: a header is none, or there are too many pages.
    """
    groups, pages = [], 0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        size = values = 0
        for column in (group.column(i) for i in range(group.num_columns)):
            starts = (column.data_page_offset, column.dictionary_page_offset)
            at = min(start for start in starts if start)
            end, left = at + column.total_compressed_size, column.num_values
            while left > 0 and at < end:
                header, at = _struct(content, at)
                more = _sizes(header)
                size, at, values, left = size + more[0], at + more[1], values + more[2], left - more[2]
                pages += 1
                if pages > MAX_PAGES:
                    raise ValueError(f"it has more than {MAX_PAGES:,} pages")
        groups.append(Unpacked(size, values))
    return groups


def _sizes(header: dict[int, Any]) -> tuple[int, int, int]:
    """Return the unpacked and packed size of a page in bytes, and its number of values: none if it holds none."""
    counted = header.get(_DATA) or header.get(_DATA_V2) or {}
    sizes = (header.get(_UNPACKED), header.get(_PACKED), counted.get(1, 0) if isinstance(counted, dict) else None)
    match sizes:
        case (int(size), int(packed), int(values)) if min(size, packed, values) >= 0:
            return size, packed, values
    raise ValueError("the header of a page has no sizes")


def _struct(content: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by their numbers, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("the header of a page nests too deep")
    fields: dict[int, Any] = {}
    number = 0
    while (first := _byte(content, at)) != 0:
        at += 1
        kind, step = first & 15, first >> 4
        if step:
            number += step
        else:
            number, at = _integer(content, at)
        if kind in (_TRUE, _FALSE):  # the value is in the kind
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(content, at, kind, depth)
    return fields, at + 1


def _value(content: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(content, at)
    if kind in (_TRUE, _FALSE, _BYTE):
        return _byte(content, at), at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        length, at = _unsigned(content, at)
        return None, at + length
    if kind == _STRUCT:
        return _struct(content, at, depth + 1)
    raise ValueError("the header of a page has a field that none has")  # lists and maps


def _byte(content: memoryview, at: int) -> int:
    if not 0 <= at < len(content):
        raise ValueError("the header of a page is cut off")
    return content[at]


def _unsigned(content: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(content, at)
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("the header of a page has a number of too many bytes")


def _integer(content: memoryview, at: int) -> tuple[int, int]:
    value, at = _unsigned(content, at)
    return (value >> 1) ^ -(value & 1), at
