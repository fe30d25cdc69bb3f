"""What the messages of an Arrow stream unpack to: each packed buffer begins with its size.

Readers allocate what the buffers claim when a message is read. The messages are looked at before that; their metadata
are FlatBuffers, of which only the list of buffers and the field of the compression are read here.

Reference: https://arrow.apache.org/docs/format/Columnar.html#compression
"""

import struct
from typing import Any

import pyarrow as pa

_RECORDS, _DICTIONARY = "record batch", "dictionary"
_HEADER, _DATA, _BUFFERS, _COMPRESSION = 2, 1, 2, 3  # numbers of fields in the tables of Message.fbs
_LENGTH = struct.Struct("<q")  # before the bytes of a packed buffer; -1: it is not packed


def largest_unpacked(stream: Any) -> int:
    """Return the bytes that the largest batch of records of a stream unpacks to, together with all dictionaries.

    Raises:
        ValueError: a message is malformed.
        pa.ArrowException: the stream is not a stream of messages.
    """
    batch = dictionaries = 0
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type not in (_RECORDS, _DICTIONARY):
            continue
        try:
            size = _unpacked(message)
        except struct.error as error:
            raise ValueError(f"the metadata of a message lead out of it ({error})") from error
        if message.type == _DICTIONARY:
            dictionaries += size
        else:
            batch = max(batch, size)
    return batch + dictionaries


def _unpacked(message: Any) -> int:
    metadata = memoryview(message.metadata).cast("B")
    records = _follow(metadata, _number(metadata, "<I", 0), _HEADER)
    if message.type == _DICTIONARY:
        records = _follow(metadata, records, _DATA)
    if not _field(metadata, records, _COMPRESSION):
        return 0
    body, total = memoryview(message.body).cast("B"), 0
    first = _follow(metadata, records, _BUFFERS)
    for at in range(_number(metadata, "<I", first)):
        start, length = struct.unpack_from("<qq", metadata, first + 4 + 16 * at)
        if length >= _LENGTH.size:
            if not 0 <= start <= len(body) - length:
                raise ValueError("a buffer lies outside of its message")
            total += max(0, _LENGTH.unpack_from(body, start)[0])
    return total


def _number(data: memoryview, kind: str, at: int) -> int:
    if at < 0:
        raise ValueError("the metadata of a message lead out of it")
    value: int = struct.unpack_from(kind, data, at)[0]
    return value


def _field(data: memoryview, table: int, number: int) -> int:
    """Return where a field of a table is, 0 if the table has none."""
    layout = table - _number(data, "<i", table)
    if 4 + 2 * number >= _number(data, "<H", layout):
        return 0
    offset = _number(data, "<H", layout + 4 + 2 * number)
    return table + offset if offset else 0


def _follow(data: memoryview, table: int, number: int) -> int:
    """Return where the table or vector begins that a field refers to."""
    field = _field(data, table, number)
    if not field:
        raise ValueError("the metadata of a message lack a field")
    return field + _number(data, "<I", field)
