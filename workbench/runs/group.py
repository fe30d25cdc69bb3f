"""Open the Zarr group of a run after checks that it is a run of a known schema and with valid attributes."""

from collections.abc import Mapping
from typing import Any, Literal

import zarr

from workbench.errors import InputError
from workbench.runs.expected_files import MAX_METADATA_BYTES, ExpectedFiles
from workbench.runs.manifest import COMPLETE, CheckedStore, DamageError, Manifest, attributes_digest, has_manifests
from workbench.runs.schema import SCHEMA
from workbench.runs.storage import ROOT, LocalStorage, Storage

_ATTRIBUTES = {
    "status": str,
    "model": dict,
    "checkpoint": dict,
    "spec": dict,
    "identity": dict,
    "provenance": dict,
    "unit_tokens": int,
}
_SIZES = ("n_layers", "num_experts", "experts_per_token", "n_heads")
_MAX_SIZE = 2**16


def open_group(storage: Storage, mode: Literal["r", "r+"] = "r", check: Literal["fast", "full"] = "fast") -> zarr.Group:
    """Return the group of a run of this schema or of an older one.

    Raises:
        InputError: the path is missing, is not a run, or has a newer schema.
    """
    if not storage.exists():
        if isinstance(storage, LocalStorage) and storage.path.is_dir():
            raise InputError(f"{storage} is an empty folder: give the folder of a run")
        raise InputError(f"{storage} does not exist: give the folder of a run")
    if isinstance(storage, LocalStorage) and not storage.path.is_dir():
        raise InputError(f"{storage} is a file: give the folder of a run")
    try:
        store = CheckedStore(_store(storage, read_only=mode == "r"))
        group = zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)
        schema = group.attrs["schema"]
        known = _are_known(group.attrs)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, KeyError, ValueError) as error:
        raise InputError(f"{storage} is not a run: expected a Zarr group with a run's attributes") from error
    except PermissionError as error:
        raise InputError(f"{storage} cannot be opened: {error.strerror}") from error
    except (UnicodeDecodeError, TypeError, RecursionError, MemoryError) as error:
        raise DamageError(storage, "its zarr.json cannot be read") from error
    if type(schema) is not int or schema < 1 or not known:
        raise InputError(f"{storage} is a Zarr group, but not a run: it lacks a run's attributes")
    if schema > SCHEMA:
        raise InputError(f"{storage} has schema {schema}, newer than this workbench's {SCHEMA}: update the workbench")
    # zarr may wrap the store again, read-only: the manifest belongs to the store that it reads through
    if has_manifests(group.attrs):
        group.store.manifest = Manifest(storage, dict(group.attrs), full=check == "full")
        if group.attrs.get("digest") != attributes_digest(storage.read(ROOT, MAX_METADATA_BYTES)):
            raise DamageError(storage, "its attributes are not those that were written")
    else:
        group.store.expected = ExpectedFiles(storage, dict(group.attrs))
        if storage.exists(COMPLETE):
            what = (
                "its attributes do not name its manifests (if adding them was interrupted, remove its folder manifest)"
            )
            raise DamageError(storage, what)
    return group


def _are_known(attributes: Mapping[str, Any]) -> bool:
    """Return whether a run's attributes are there, of their types, and its model has sizes that a model may have."""
    if not all(isinstance(attributes.get(name), kind) for name, kind in _ATTRIBUTES.items()):
        return False
    sizes = [attributes["model"].get(name) for name in _SIZES]
    return all(type(n) is int and 0 < n <= _MAX_SIZE for n in sizes)


def _store(storage: Storage, *, read_only: bool) -> Any:
    store = storage.store()
    return zarr.storage.LocalStore(store, read_only=read_only) if isinstance(store, str) else store
