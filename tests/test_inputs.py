"""Devices and pipes without a writer are refused; what a pipe gives is read once."""

import os
import threading
from pathlib import Path

import pytest

from workbench import inputs
from workbench.errors import InputError
from workbench.inputs import regular_file


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
