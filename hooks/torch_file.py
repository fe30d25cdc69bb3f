"""Read a file that `torch.save` wrote: tensors and plain values only, nothing in it is executed."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from workbench.errors import InputError, refuse_lfs_pointer


def read_torch_file(path: Path) -> Any:
    """Return the content of a .pt file, with its tensors on the CPU.

    Raises:
        InputError: the file is missing, a git-lfs pointer, damaged, or holds objects other than tensors, numbers,
            text, lists and dicts; those could run code, so PyTorch's restricted reader refuses them.
    """
    if not path.is_file():
        raise InputError(f"{path} is {'not a file' if path.exists() else 'missing: the folder is incomplete'}")
    with path.open("rb") as file:
        refuse_lfs_pointer(path, file.read(64))
    _refuse_packed(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path} is not a file of tensors that can be read safely: {reason}") from error


def _refuse_packed(path: Path) -> None:
    """Refuse a zip archive with compressed members: `torch.save` writes none, and they may unpack to anything."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older file, or one that torch refuses
    if packed:
        name = ascii(packed[0].filename)[:60]
        raise InputError(f"{path}: its member {name} is compressed, expected a file as torch.save writes it")
