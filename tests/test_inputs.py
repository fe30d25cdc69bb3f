"""Devices and pipes without a writer are refused; what a pipe gives is read once."""

import base64
import contextlib
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.cli.checks import limits
from workbench import inputs
from workbench.errors import InputError
from workbench.experiments.branch_edits import read_paraphrases
from workbench.harmony.hosts import routing
from workbench.harmony.hosts.routing import RoutingError
from workbench.inputs import regular_file
from workbench.research.steering_sources import read_vector
from workbench.runs import attention_file


def test_a_pipe_is_read_and_one_without_a_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setattr(inputs, "WRITER_TIMEOUT_S", 0.1)
    with pytest.raises(InputError, match="a pipe to which nothing was written"), regular_file(fifo):
        pass
    monkeypatch.setattr(inputs, "WRITER_TIMEOUT_S", 60.0)
    writer = threading.Thread(target=lambda: fifo.write_bytes(b"rows\n" * 100_000))
    writer.start()
    with regular_file(fifo) as copy:
        assert copy.read_bytes() == b"rows\n" * 100_000
    writer.join()
    assert not copy.exists()


def test_devices_are_refused_and_files_are_themselves(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="is a device"), regular_file(device):
            pass
    with pytest.raises(InputError, match="absent cannot be read: No such file"), regular_file(tmp_path / "absent"):
        pass
    with pytest.raises(InputError, match="is a folder"), regular_file(tmp_path):
        pass
    (tmp_path / "file").write_text("x")
    with regular_file(tmp_path / "file") as path:
        assert path == tmp_path / "file"


def test_an_error_of_the_caller_is_not_one_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), regular_file(__file__):
        raise OSError("disk")


def test_a_pipe_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_PIPE_BYTES", 3_000_000)
    os.mkfifo(tmp_path / "fifo")

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), (tmp_path / "fifo").open("wb") as pipe:
            while True:
                pipe.write(bytes(100_000))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(InputError, match="gives more than 3,000,000 bytes"), regular_file(tmp_path / "fifo"):
        pass
    writer.join()


READERS = {
    "x.jsonl": read_paraphrases,
    "x.npy": read_vector,
    "x.safetensors": read_vector,
    "x.npz": attention_file.read,
}


@pytest.mark.parametrize("name", READERS)
def test_what_options_name_is_no_pipe_and_no_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside the main input: paraphrases, vectors, attention patterns. `limits` ends a reader that waits."""
    monkeypatch.setattr(inputs, "WRITER_TIMEOUT_S", 0.05)
    path = tmp_path / name
    os.mkfifo(path)
    with limits(), pytest.raises(InputError, match=name):
        READERS[name](path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with limits(), pytest.raises(InputError, match=name):
        READERS[name](path)


def test_an_array_of_an_absurd_shape_is_refused(tmp_path: Path) -> None:
    """Its header asks for a petabyte; the array follows in no file."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**48,)}
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    (tmp_path / "x.npy").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="cannot be read as a vector"):
        read_vector(tmp_path / "x.npy")
    with pytest.raises(RoutingError, match=r"not a \.npy array"):
        routing._npy(base64.b64encode(content.getvalue()).decode())
