"""A file of attention patterns of one sequence: a NumPy archive, written by `workbench attention`.

    ds = attention_file.read("attention.npz")
    ds["pattern"].sel(layer=0, head=3)          # [query key], with `sink` and `earlier` beside it

`sink`, `earlier` and the pattern of a query sum to one: `earlier` is the attention to keys before the first one.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xarray as xr

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.inputs import open_regular

MAX_VALUES = 2**22  # of the pattern: layers × heads × queries × keys
MAX_CONTEXT = 2**30  # values of one layer's pattern before the window is cut out: heads × keys × keys
# what a file that is not an archive of these arrays raises; MemoryError: of a shape that is absurd
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
_DIMS = {
    "pattern": ("layer", "head", "query", "key"),
    "sink": ("layer", "head", "query"),
    "earlier": ("layer", "head", "query"),
}


def write(ds: xr.Dataset, path: Path) -> None:
    """Write the patterns of `workbench.experiments.attention_patterns` with 16-bit numbers."""
    arrays: dict[str, Any] = {name: ds[name].transpose(*dims).values.astype(np.float16) for name, dims in _DIMS.items()}
    attributes = json.dumps(dict(ds.attrs) | {"start": int(ds["query"][0]), "layers": ds["layer"].values.tolist()})
    with path.open("wb") as file:
        np.savez_compressed(file, attributes=np.frombuffer(attributes.encode(), dtype=np.uint8), **arrays)


def read(path: Path) -> xr.Dataset:
    """Return the patterns of a file. Nothing in it is executed.

    Raises:
        InputError: it is not such a file, or it holds more values than `MAX_VALUES`.
    """
    try:
        with open_regular(path) as file:
            _check_size(file)
            with np.load(file, allow_pickle=False) as archive:
                attributes = parse_json(bytes(archive["attributes"]).decode())
                arrays = {name: archive[name].astype(np.float32) for name in _DIMS}
        layers, start = attributes.pop("layers"), int(attributes.pop("start"))
        queries = np.arange(start, start + arrays["pattern"].shape[2])
        coords = {"layer": layers, "head": np.arange(arrays["pattern"].shape[1]), "query": queries, "key": queries}
        return xr.Dataset({name: (dims, arrays[name]) for name, dims in _DIMS.items()}, coords, attributes)
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as attention patterns ({reason}): write it with `workbench attention`"
        ) from error


def _check_size(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        size = sum(item.file_size for item in archive.infolist())
    if size > 8 * MAX_VALUES:
        raise InputError(f"it would take {size:,} bytes")
    file.seek(0)
