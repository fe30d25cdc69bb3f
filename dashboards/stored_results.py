"""Results that are stored beside a run: of experiments that were made with its sequences, and attribution graphs.

`workbench study NAME RUN --model MODEL --out FOLDER` writes the first, `workbench graph … --out FILE.json` the second.
Both are found in the folder that holds the run and in the folders in it, whatever their names are. A result belongs to
a run if it names the run's digest; a graph names no run, so every graph there is listed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xarray as xr

from workbench import registry
from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.studies.result import from_json

MOST_FILES = 500  # that are looked at
MOST_BYTES = 32 * 2**20  # of one of them
_NAME = re.compile(r"[^/\\\x00]{1,200}\.json")

# what reading a result raises that is none
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class StoredResults:
    """Results by experiment and dataset, attribution graphs by name, and what could not be read, with the reason."""

    experiments: Mapping[str, Mapping[str, xr.Dataset]] = field(default_factory=dict)
    graphs: Mapping[str, Path] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    omitted: int = 0  # files beyond MOST_FILES


def stored_beside(run_path: Path, digest: str) -> StoredResults:
    """Return what is stored beside the run at this path. digest: of the run, without excluded sequences."""
    experiments: dict[str, dict[str, xr.Dataset]] = {}
    graphs: dict[str, Path] = {}
    unreadable: dict[str, str] = {}
    paths = list(_candidates(run_path.resolve().parent))
    known = {record.name for record in registry.experiments()}
    for path in paths[:MOST_FILES]:
        name = path.relative_to(run_path.resolve().parent).as_posix()
        kind, value = _kind(path, *_state(path))
        if kind == "graph":
            graphs[name.removesuffix(".json")] = path
        elif kind == "unreadable":
            unreadable[name] = str(value)
        elif kind == "result" and value.attrs["study"] in known and value.attrs.get("run_digest") == digest:
            study = str(value.attrs["study"])
            experiments.setdefault(study, {})[path.stem.removeprefix(f"{study}_")] = value
    return StoredResults(experiments, graphs, unreadable, max(0, len(paths) - MOST_FILES))


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield JSON files of a folder and of the folders in it; stores, links and hidden files are passed over."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    inner = [entry for entry in entries if entry.is_dir() and not entry.is_symlink() and not _hidden(entry)]
    for path in (folder, *(entry for entry in inner if entry.suffix != ".zarr")):
        try:
            files = sorted(path.iterdir())
        except OSError:
            continue
        for file in files:
            if _NAME.fullmatch(file.name) and not _hidden(file) and not file.is_symlink() and file.is_file():
                yield file


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2 * MOST_FILES)
def _kind(path: Path, changed: int, size: int) -> tuple[str, Any]:
    """Return what a file is: ("result", its dataset), ("graph", None), ("unreadable", why) or ("other", None).

    changed, size: of the file, so that a file that was replaced is read again.
    """
    try:
        content = read_json(path, max_bytes=MOST_BYTES)
    except (InputError, OSError, ValueError) as error:
        return "unreadable", str(error)
    if not isinstance(content, dict):
        return "other", None
    if {"nodes", "links", "metadata"} <= content.keys():
        return "graph", None
    attrs = content.get("attrs")
    if "data_vars" not in content or not isinstance(attrs, dict) or not isinstance(attrs.get("study"), str):
        return "other", None
    try:
        return "result", from_json(content)
    except _DAMAGE as error:
        return "unreadable", f"not a result of the workbench: {type(error).__name__}"
