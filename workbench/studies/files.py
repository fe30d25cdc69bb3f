"""Writing several files into a directory so that none of them is ever half-written."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from workbench.errors import InputError


def refuse_paths(names: Iterable[str]) -> None:
    """File names that come from labels of a run must not lead out of the directory they are written to."""
    for name in names:
        if name != Path(name).name or name == "..":
            raise InputError(f"{name!r} cannot be the name of a file; it needs one without folders")


def write_files(files: Mapping[str, str | bytes], out_dir: str | os.PathLike[str]) -> list[Path]:
    """Write all files beside their place first, then move them there one by one: none is ever half-written."""
    refuse_paths(files)
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out needs a directory to write {len(files)} files into")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for name in files:
            os.replace(Path(staging) / name, out / name)
    return [out / name for name in files]
