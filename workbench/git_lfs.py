"""Recognise git-lfs pointers: small text files in the place of large files that were not downloaded.

Reference: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from pathlib import Path

from workbench.errors import InputError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise an error if a file that begins with these bytes is a git-lfs pointer.

    Raises:
        InputError: it is one.
    """
    if beginning.startswith(_POINTER):
        raise InputError(f"{path} is a git-lfs pointer: run git lfs pull")
