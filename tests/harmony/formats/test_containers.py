"""The objects of a file are the same in every container, which its first bytes tell and not its name."""

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harmony.formats.lying_tables import write_lie
from workbench.errors import InputError
from workbench.harmony.formats import containers
from workbench.harmony.formats.containers import objects

ROWS: list[dict[str, Any]] = [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "JSON": lambda path: path.write_bytes(LINES),
    "JSON with a mark of its order": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "JSON array": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "JSON documents": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "gzip, JSON": lambda path: path.write_bytes(gzip.compress(LINES)),
    "zstd, JSON": lambda path: path.write_bytes(pa.compress(LINES, "zstd", asbytes=True)),
    "Parquet": parquet,
    "Arrow": arrow,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_gives_the_same_objects(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "data.bin")
    container, rows = objects(tmp_path / "data.bin")
    assert [value for _, value in rows] == ROWS
    assert kind.startswith(container)


def test_a_bad_line_is_an_error_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LINES.split(b"\n")[0] + b"\n{\n" + LINES.split(b"\n")[1])
    (_, first), (where, bad), (_, last) = objects(tmp_path / "x")[1]
    assert [first, last] == ROWS
    assert where == "line 2"
    assert isinstance(bad, InputError)


@pytest.mark.parametrize(
    "content",
    [b"words", b"\xff\xfe", b"[" * 200, gzip.compress(LINES)[:-6]],
    ids=["words", "no UTF-8", "deep", "cut off gzip"],  # bytes of gzip name the time
)
def test_what_is_no_container_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=str(tmp_path / "x")):
        list(objects(tmp_path / "x")[1])


# ---- limits --------------------------------------------------------------------------------------------------------

LONGEST_S = 20.0  # of processor time, within which what is too large is refused


def refusal(path: Path) -> str:
    """Return why a file is refused: in one line, soon, and without much memory of Arrow's."""
    begun = time.process_time()
    with pytest.raises(InputError) as raised:
        list(objects(path)[1])
    assert time.process_time() - begun < LONGEST_S
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **options)


def write_arrow(path: Path, columns: dict[str, Any]) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


TABLES = pytest.mark.parametrize("write", [write_parquet, write_arrow], ids=["Parquet", "Arrow"])
Write = Callable[[Path, dict[str, Any]], None]


@TABLES
def test_an_absurd_number_of_rows_is_refused(write: Write, tmp_path: Path) -> None:
    """A column without values takes no bytes for any number of rows."""
    write(tmp_path / "x", {"messages": pa.nulls(containers.MAX_ROWS + 1)})
    assert (tmp_path / "x").stat().st_size < 100_000
    assert "10,000,001 rows" in refusal(tmp_path / "x")


@TABLES
def test_too_many_columns_are_refused(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "x", {f"c{i}": [1] for i in range(10_001)})
    assert "10,001 columns" in refusal(tmp_path / "x")


def nested(levels: int) -> pa.Array:
    kind = pa.int32()
    for _ in range(levels):
        kind = pa.struct([("a", kind)])
    return pa.nulls(1, kind)


def test_tables_that_nest_too_deep_are_refused(tmp_path: Path) -> None:
    """Arrow's own writer refuses such a table."""
    write_parquet(tmp_path / "x", {"messages": nested(200)})
    assert "is not a complete Parquet file" in refusal(tmp_path / "x")
    for write in (write_parquet, write_arrow):
        write(tmp_path / "x", {"messages": nested(50)})
        assert len(list(objects(tmp_path / "x")[1])) == 1, "the negative control"


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pa.array(["x" * 1_000_000] * 8)
    write_parquet(tmp_path / "x", {"a": text, "b": text}, use_dictionary=False, compression="zstd")
    assert (tmp_path / "x").stat().st_size < 100_000
    monkeypatch.setattr(containers, "_LONGEST_DOCUMENT", 10_000_000)
    assert "in one row group" in refusal(tmp_path / "x"), "no column alone is too large"


def test_pages_that_unpack_to_more_than_the_metadata_claim_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four columns of 20 MB in a file of some kilobytes; the negative control believes the metadata."""
    monkeypatch.setattr(containers, "_LONGEST_DOCUMENT", 50_000_000)
    write_lie(tmp_path / "x", 20_000_000, columns=4)
    assert (tmp_path / "x").stat().st_size < 100_000
    assert "unpacks to 80,0" in refusal(tmp_path / "x")
    monkeypatch.setattr(containers.parquet_pages, "unpacked", lambda content, metadata: [])
    assert len(list(objects(tmp_path / "x")[1])) == 1


def test_packed_buffers_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB of one letter, and a buffer that claims an exabyte; the negative control reads what the buffers claim."""
    monkeypatch.setattr(containers, "_LONGEST_DOCUMENT", 10_000_000)
    table = pa.table({"text": ["x" * 20_000_000]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "x"), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)
    content = (tmp_path / "x").read_bytes()
    assert len(content) < 100_000
    assert "unpacks to 20,0" in refusal(tmp_path / "x")
    size = (20_000_000).to_bytes(8, "little")
    assert content.count(size) >= 1
    (tmp_path / "y").write_bytes(content.replace(size, (2**60).to_bytes(8, "little")))
    assert "unpacks to 1,15" in refusal(tmp_path / "y")
    monkeypatch.setattr(containers, "largest_unpacked", lambda source: 0)
    assert len(list(objects(tmp_path / "x")[1])) == 1


@TABLES
def test_lists_of_nothing_are_not_made(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of two million nulls takes few bytes in a file; the negative control makes all of them."""
    length = 2_000_000
    monkeypatch.setattr(containers, "_MAX_VALUES", length)
    write(tmp_path / "x", {"messages": pa.ListArray.from_arrays(pa.array([0, length], pa.int32()), pa.nulls(length))})
    assert (tmp_path / "x").stat().st_size < 100_000
    assert "values in one" in refusal(tmp_path / "x")
    monkeypatch.setattr(containers, "_MAX_VALUES", 2 * length)
    assert [len(row["messages"]) for _, row in objects(tmp_path / "x")[1]] == [length]


@pytest.mark.parametrize("damage", range(0, 60, 4))
@pytest.mark.parametrize("kind", ["Parquet", "Arrow"])
def test_a_changed_byte_of_a_header_is_one_error_or_read(kind: str, damage: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    WRITERS[kind](path)
    content = bytearray(path.read_bytes())
    content[4 + damage] ^= 0xFF
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert len(list(objects(path)[1])) <= len(ROWS)


@TABLES
def test_a_value_that_many_rows_share_is_not_copied_for_all_of_them(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary of one text makes a thousand rows of it; the negative control makes them at once."""
    indices = pa.array([0] * 1000, pa.int32())
    write(tmp_path / "x", {"text": pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 1_000_000]))})
    assert (tmp_path / "x").stat().st_size < 3_000_000
    most = []
    monkeypatch.setattr(containers, "_BATCH_ROWS", 1000)
    slices = containers._rows_at_once
    monkeypatch.setattr(containers, "_rows_at_once", lambda size: most.append(slices(size)) or most[-1])
    for budget in (50_000_000, 10**12):
        monkeypatch.setattr(containers, "_BATCH_BYTES", budget)
        most.clear()
        _, row = next(objects(tmp_path / "x")[1])
        assert row == {"text": "x" * 1_000_000}
        assert (max(most[-1:]) <= 50) == (budget < 10**12)


def test_texts_that_are_no_utf8_are_one_error(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    for write in (write_parquet, write_arrow):
        write(tmp_path / "x", {"text": bad})
        assert "UTF8" in refusal(tmp_path / "x")


def test_offsets_that_lead_out_of_the_file_are_one_error(tmp_path: Path) -> None:
    write_arrow(tmp_path / "x", {"text": ["abc", "def", "ghi"]})
    data = (tmp_path / "x").read_bytes()
    offsets = bytes.fromhex("00000000 03000000 06000000 09000000")
    assert data.count(offsets) == 1
    (tmp_path / "x").write_bytes(data.replace(offsets, bytes.fromhex("00000000 03000000 ffffff7f 09000000")))
    assert "is not a complete Arrow file" in refusal(tmp_path / "x")


def test_a_bomb_in_gzip_or_zstd_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_LONGEST_DOCUMENT", 1_000_000)
    for packed in (gzip.compress(bytes(50_000_000)), pa.compress(bytes(50_000_000), "zstd", asbytes=True)):
        (tmp_path / "x").write_bytes(packed)
        before = pa.total_allocated_bytes()
        assert "unpacks to more than 1,000,000 bytes" in refusal(tmp_path / "x")
        assert pa.total_allocated_bytes() - before < 10_000_000


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    """A file of a terabyte of zeros, and one that begins as JSON Lines."""
    for start, why in ((b"", "in one document"), (LINES + b"\n", "line 3 has more than")):
        with (tmp_path / "x").open("wb") as file:
            file.write(start)
            file.truncate(2**40)
        assert why in refusal(tmp_path / "x")


def test_a_pipe_in_a_folder_of_files_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.arrow"):
        os.mkfifo(tmp_path / name)
        assert "pipe" in refusal(tmp_path)
        (tmp_path / name).unlink()


ROW = '{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]}'


def test_a_bad_line_after_a_blank_one_hides_none_of_the_following(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(f"\r\n{ROW}\r\n{{bad\r\n{ROW}\r\n".encode())
    assert [type(value).__name__ for _, value in objects(path)[1]] == ["dict", "InputError", "dict"]
    path.write_text(json.dumps(json.loads(ROW), indent=1) + "{bad" + ROW)
    *_, (where, value) = objects(path)[1]
    assert (where, type(value).__name__) == ("document 2 and what follows", "InputError")


def test_no_file_of_a_folder_is_passed_over_silently(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".hidden.jsonl", "c.JSONL"):
        (tmp_path / name).write_text(ROW)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(ROW.encode()))
    (tmp_path / "d.eval").write_bytes(b"PK")
    (tmp_path / "README.md").write_text("# Rows")
    places = {where.split(",")[0]: value for where, value in objects(tmp_path)[1]}
    assert places.keys() == {"a.jsonl", "b.jsonl.gz", "c.JSONL", "d.eval"}
    assert [name for name, value in places.items() if isinstance(value, InputError)] == ["d.eval"]
