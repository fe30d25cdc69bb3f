"""Shards that we write are Zarr's own: any reader opens them, whatever the shapes."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from workbench.runs import shards
from workbench.runs.storage import LocalStorage

CASES = {
    "layers and tokens": ((3, 40, 5), (1, 8, 5), (1, 16, 5), 1, 16, "uint16"),
    "one axis": ((40,), (8,), (16,), 0, 32, "int32"),
    "no shards": ((4, 6, 7), (1, 6, 7), None, 0, 2, "float32"),
    "a unit of several shards": ((2, 64, 3), (1, 8, 3), (1, 16, 3), 1, 16, "float16"),
    "flags": ((32,), (8,), (16,), 0, 0, "bool"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_zarr_reads_what_we_write(name: str, fraction: float, tmp_path: Path) -> None:
    shape, chunks, grain, axis, start, dtype = CASES[name]
    fill = np.nan if dtype.startswith("float") else 0
    array = zarr.create_array(
        str(tmp_path / "a"),
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=grain,
        fill_value=fill,
        compressors=ZstdCodec(level=shards.LEVEL, checksum=True),
    )
    rng = np.random.default_rng(0)
    size = list(shape)
    size[axis] = max(1, int((shape[axis] - start) * fraction))
    values = rng.integers(0, 2 if dtype == "bool" else 200, size).astype(dtype)
    for call in shards.writes(array, LocalStorage(tmp_path), "a", start, axis, values):
        call()
    want = np.full(shape, fill, dtype=dtype)
    place = [slice(None)] * len(shape)
    place[axis] = slice(start, start + size[axis])
    want[tuple(place)] = values
    got = zarr.open_array(str(tmp_path / "a"), mode="r")[...]
    np.testing.assert_array_equal(got, want)


def test_a_flipped_byte_and_a_cut_index_are_found_by_the_reader(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path / "a"),
        shape=(16, 50),
        dtype="uint16",
        chunks=(4, 50),
        shards=(16, 50),
        compressors=ZstdCodec(level=shards.LEVEL, checksum=True),
    )
    values = np.random.default_rng(0).integers(0, 1000, (16, 50)).astype("uint16")
    for call in shards.writes(array, LocalStorage(tmp_path), "a", 0, 0, values):
        call()
    file = tmp_path / "a" / "c" / "0" / "0"
    content = file.read_bytes()
    for place in (20, len(content) - 10):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Exception, match=r"(?i)checksum|crc|zstd|decompress"):
            zarr.open_array(str(tmp_path / "a"), mode="r")[...]


def test_a_start_inside_a_shard_is_our_own_mistake(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a"), shape=(16,), dtype="int32", chunks=(4,), shards=(8,))
    with pytest.raises(AssertionError, match="inside a shard"):
        next(shards.writes(array, LocalStorage(tmp_path), "a", 4, 0, np.zeros(8, dtype="int32")))


@pytest.mark.parametrize("name", CASES)
def test_what_zarr_writes_we_read(name: str, tmp_path: Path) -> None:
    shape, chunks, grain, axis, start, dtype = CASES[name]
    array = zarr.create_array(
        str(tmp_path / "a"),
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=grain,
        fill_value=0,
        compressors=shards.CODEC,
        config={"write_empty_chunks": grain is None},
    )
    array[:] = np.random.default_rng(1).integers(0, 2, shape).astype(dtype) * (np.arange(shape[axis]) % 7 < 3).reshape(
        [-1 if a == axis else 1 for a in range(len(shape))]
    )  # chunks of nothing but the fill value are left out by zarr
    stop = shape[axis]
    place = [slice(None)] * len(shape)
    place[axis] = slice(start, stop)
    got = shards.read(array, LocalStorage(tmp_path), "a", start, stop, axis)
    assert np.array_equal(got, array[tuple(place)])


def test_damage_is_found_by_our_own_reading(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path / "a"), shape=(16, 50), dtype="uint16", chunks=(4, 50), shards=(16, 50), compressors=shards.CODEC
    )
    array[:] = np.random.default_rng(0).integers(0, 1000, (16, 50))
    file = tmp_path / "a" / "c" / "0" / "0"
    content = file.read_bytes()
    for at in (20, len(content) - 10):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(Exception, match=r"(?i)checksum|zstd|decompress"):
            shards.read(array, LocalStorage(tmp_path), "a", 0, 16, 0)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        shards.read(array, LocalStorage(tmp_path), "a", 0, 16, 0)
