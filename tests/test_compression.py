"""What unpacks to more than it should is refused by what its header states, and never unpacked."""

import numpy as np
import pytest
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec

from tests.runs.bombs import bomb
from workbench.compression import SizedZstd, frame_size, unpack


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 100_000])
def test_a_header_states_what_a_frame_unpacks_to(size: int) -> None:
    for level in (1, 9):
        packed = Zstd(level=level, checksum=True).encode(bytes(size))
        assert frame_size(packed) == size
        assert unpack(packed, size).tobytes() == bytes(size)


@pytest.mark.parametrize("size", [2**33, 2**70, None])
def test_a_bomb_is_not_unpacked(size: int | None) -> None:
    packed = bomb(2**26, claimed=size)
    assert len(packed) < 4096
    with pytest.raises(ValueError, match="unpacks to"):
        unpack(packed, 1024)
    if size is None:
        assert len(Zstd().decode(packed)) == 2**26, "the negative control: without the check it is"


@pytest.mark.parametrize("data", [b"", b"\x28\xb5", b"PK\x03\x04" * 10, bomb(2**20)[:6]])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="zstd frame"):
        frame_size(data)


def test_a_second_frame_after_the_first_is_not_unpacked() -> None:
    packed = Zstd().encode(b"1234") + bomb(2**28)
    with pytest.raises(ValueError, match="too small"):
        unpack(packed, 4)


def test_zarr_reads_with_the_check_what_it_wrote_without(tmp_path: object) -> None:
    values = np.arange(1000, dtype="int32")
    array = zarr.create_array(f"{tmp_path}/a", shape=(1000,), chunks=(100,), dtype="int32", compressors=ZstdCodec())
    array[:] = values
    again = zarr.open_array(f"{tmp_path}/a", mode="r")
    assert isinstance(again.compressors[0], SizedZstd)
    assert np.array_equal(again[:], values)
