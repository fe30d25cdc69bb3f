"""A .pt file is read for its tensors; code in it is not executed."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from workbench.errors import InputError
from workbench.hooks.torch_file import read_torch_file


class Attack:
    """An object whose unpickling creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_tensors_and_plain_values_are_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(3.0), "k": 4, "names": ["a"]}, tmp_path / "x.pt")
    read = read_torch_file(tmp_path / "x.pt")
    assert read["weight"].tolist() == [0, 1, 2]
    assert (read["k"], read["names"]) == (4, ["a"])


def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, target = tmp_path / "x.pt", tmp_path / "executed"
    torch.save({"weight": torch.ones(2), "attack": Attack(target)}, path)
    with pytest.raises(InputError, match="not a file of tensors that can be read safely"):
        read_torch_file(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the negative control: an unrestricted reader executes the file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot|not a file of tensors"),
        (b"PK\x03\x04 cut off", "not a file of tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_torch_file(tmp_path / "x.pt")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        read_torch_file(tmp_path / "x.pt")
    with pytest.raises(InputError, match="is not a file"):
        read_torch_file(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB of zeros in some kilobytes; the negative control reads them."""
    torch.save({"weight": torch.zeros(25_000_000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "y.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "y.pt").stat().st_size < 200_000
    with pytest.raises(InputError, match="is compressed, expected a file as"):
        read_torch_file(tmp_path / "y.pt")
    monkeypatch.setattr("workbench.hooks.torch_file._refuse_packed", lambda path: None)
    assert read_torch_file(tmp_path / "y.pt")["weight"].shape == (25_000_000,)
