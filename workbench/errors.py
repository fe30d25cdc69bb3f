"""Errors that a user can fix: one line that states what was wrong, what was expected and what to do."""

from pathlib import Path


class InputError(ValueError):
    """Refused input or wrong usage; the command line prints it as one line and exits with 2."""


class JobError(RuntimeError):
    """A job that began and could not go on; the command line prints it as one line and exits with 1."""


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path, beginning: bytes) -> None:
    """Raise an error if a file that begins with these bytes is a git-lfs pointer: text instead of a large file.

    Raises:
        InputError: it is one.
    Reference: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if beginning.startswith(_LFS_POINTER):
        raise InputError(f"{path} is a pointer of git-lfs instead of the file: run `git lfs pull`")
