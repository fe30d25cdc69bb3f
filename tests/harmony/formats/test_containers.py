"""The objects of a file are the same in every container, which its first bytes tell and not its name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench.errors import InputError
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
    found, rows = objects(tmp_path / "data.bin")
    assert [value for _, value in rows] == ROWS
    assert kind.startswith(found)


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
