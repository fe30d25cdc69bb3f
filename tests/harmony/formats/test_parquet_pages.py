"""The headers of pages are those that pyarrow wrote, for every codec, version and kind of value."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench.harmony.formats import parquet_pages
from workbench.harmony.formats.parquet_pages import unpacked

LISTS = [[], None, ["a"], ["b" * 100, None]] * 50
COLUMNS = {"text": [str(i) for i in range(200)], "number": [i % 3 for i in range(200)], "list": LISTS}


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_sizes_and_values_are_those_of_the_metadata(codec: str, version: str, dictionary: bool, tmp_path: Path) -> None:
    options = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary}
    pq.write_table(pa.table(COLUMNS), tmp_path / "x", row_group_size=64, data_page_size=100, **options)
    metadata = pq.read_metadata(tmp_path / "x")
    groups = unpacked(memoryview((tmp_path / "x").read_bytes()), metadata)
    assert len(groups) == 4
    for i, group in enumerate(groups):
        columns = [metadata.row_group(i).column(c) for c in range(3)]
        assert group.values == sum(column.num_values for column in columns)
        total = sum(column.total_uncompressed_size for column in columns)  # with the headers of pages
        assert 0.2 * total < group.size <= total


def test_headers_that_are_cut_off_or_too_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table(COLUMNS), tmp_path / "x", data_page_size=100)
    content, metadata = (tmp_path / "x").read_bytes(), pq.read_metadata(tmp_path / "x")
    with pytest.raises(ValueError, match="is cut off"):
        unpacked(memoryview(content[:20]), metadata)
    with pytest.raises(ValueError, match=r"has no sizes|has a field|nests too deep|too many bytes"):
        unpacked(memoryview(content[:4] + b"\x1c" * (len(content) - 4)), metadata)
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 3)
    with pytest.raises(ValueError, match="more than 3 pages"):
        unpacked(memoryview(content), metadata)
