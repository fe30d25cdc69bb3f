"""The unpacked sizes of Arrow messages are those of the values that were written."""

import contextlib
import io

import pyarrow as pa
import pytest

from workbench.harmony.formats.arrow_messages import largest_unpacked


def stream(codec: str | None, batches: list[pa.RecordBatch]) -> pa.BufferReader:
    file = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(file, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pa.BufferReader(file.getvalue())


def batch(rows: int) -> pa.RecordBatch:
    words = pa.array(["word"] * rows).dictionary_encode()
    return pa.record_batch({"text": pa.array(["x" * 1000] * rows), "n": pa.array(range(rows)), "word": words})


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_the_largest_batch_counts(codec: str) -> None:
    sizes = [1000 * n + 4 * (n + 1) + 8 * n + 4 * n for n in (10, 3000, 20)]  # text, its offsets, n, indices
    largest = largest_unpacked(stream(codec, [batch(10), batch(3000), batch(20)]))
    assert max(sizes) <= largest < 1.01 * max(sizes)


def test_what_is_not_packed_takes_nothing_more() -> None:
    assert largest_unpacked(stream(None, [batch(3000)])) == 0


@pytest.mark.parametrize("place", range(0, 1200, 37))
def test_damaged_metadata_are_an_error_or_a_size(place: int) -> None:
    content = bytearray(stream("zstd", [batch(50)]).read())
    content[place % len(content)] ^= 0xFF
    with contextlib.suppress(ValueError, OSError, pa.ArrowException):
        assert largest_unpacked(pa.BufferReader(bytes(content))) >= 0
