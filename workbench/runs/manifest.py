"""Manifests: size, ending and SHA-256 of every file of a run, by which damage is found when a file is read or verified.

    manifest/created.json    tables and array metadata; the attributes of the run hold a digest of themselves
    manifest/unit-N.json     the shards of unit N, written before the flag that commits the unit
    manifest/complete.json   the totals, and the digest of every other manifest

A manifest names what it belongs to and carries a digest of its own content, so a manifest that is changed or exchanged
is found too. `Manifest.check` is what every read passes: existence, size and the last bytes of the file, which hold the
index of a shard or the checksum of a chunk and so distinguish two shards of the same size. Chunks carry checksums of
their own, so a flipped bit elsewhere is found when its chunk is decoded.
"""

import asyncio
import hashlib
import json
import math
import stat
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, WrapperStore

from workbench.bounded_json import parse_json
from workbench.compression import UnpackedSizeError
from workbench.errors import InputError
from workbench.memory import raise_if_limited
from workbench.runs.expected_files import MAX_METADATA_BYTES, ExpectedFiles
from workbench.runs.schema import MANIFESTS
from workbench.runs.storage import Storage

CREATED, COMPLETE = "manifest/created.json", "manifest/complete.json"
TAIL_BYTES = 16_384
# of the arrays of a run; others may unpack a few bytes to gigabytes
_CODECS = {"bytes", "vlen-utf8", "zstd", "sharding_indexed", "crc32c"}
_KEYS = {"name": "default", "configuration": {"separator": "/"}}  # names of the files of chunks
_SMALL_ARRAY = 2**20  # values, which a chunk of an array of any size may have


class DamageError(InputError):
    """A run that is not what was written: something of it is missing or changed."""

    def __init__(self, storage: object, what: str) -> None:
        super().__init__(f"{storage} is damaged: {what}; `workbench verify` lists all damage")
        self.what = what


@contextmanager
def reading(storage: object, what: str) -> Iterator[None]:
    """Turn whatever zarr and codecs raise at a damaged file into a `DamageError` that names what was read."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) and not isinstance(error, UnpackedSizeError):
            raise
        raise_if_limited(error)
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DamageError(storage, f"{what} cannot be read ({reason})") from error


class Entry(NamedTuple):
    """What a file was when it was written. tail: crc32c of its last bytes."""

    size: int
    tail: int
    sha256: str


def entry(parts: Sequence[bytes]) -> Entry:
    """Return the entry of a file with this content."""
    sha, tail = hashlib.sha256(), b""
    for part in parts:
        sha.update(part)
        tail = (tail + part[-TAIL_BYTES:])[-TAIL_BYTES:]
    return Entry(sum(map(len, parts)), google_crc32c.value(tail), sha.hexdigest())


def unit_key(index: int) -> str:
    """Return the key of a unit's manifest."""
    return f"manifest/unit-{index}.json"


def write(storage: Storage, key: str, files: Mapping[str, Entry]) -> None:
    """Write the manifest of these files."""
    listed = {name: list(files[name]) for name in sorted(files)}
    storage.put(key, [json.dumps({"manifest": key, "digest": _digest(key, listed), "files": listed}).encode()])


def write_complete(storage: Storage, totals: Iterable[str], units: int) -> None:
    """Write the manifest of the totals and of all other manifests, those of this many units."""
    keys = [*totals, CREATED, *map(unit_key, range(units))]
    write(storage, COMPLETE, {key: entry([storage.read(key)]) for key in keys})


def read(storage: Storage, key: str) -> tuple[str, dict[str, Entry]]:
    """Return the digest and the entries of a manifest.

    Raises:
        DamageError: the manifest is missing, changed, or that of something else.
    """
    try:
        content = parse_json(storage.read(key, MAX_METADATA_BYTES))
        listed, digest = content["files"], content["digest"]
        files = {str(name): Entry(int(size), int(tail), str(sha)) for name, (size, tail, sha) in listed.items()}
    except FileNotFoundError as error:
        raise DamageError(storage, f"{key} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise DamageError(storage, f"{key} cannot be read") from error
    if content.get("manifest") != key or digest != _digest(key, listed):
        raise DamageError(storage, f"{key} was changed")
    return digest, files


def _digest(key: str, listed: Any) -> str:
    return hashlib.sha256(json.dumps([key, listed], sort_keys=True).encode()).hexdigest()


def has_manifests(attributes: Mapping[str, Any]) -> bool:
    """Return whether a run has manifests: those of schema 3 and newer, and older ones to which they were added."""
    return attributes["schema"] >= MANIFESTS or "digest" in attributes


def attributes_digest(root: bytes) -> str:
    """Return the SHA-256 of the root's `zarr.json` without the status, which changes, and without this digest itself.

    It is one of the attributes: they hold the time of the start, and manifests of equal content are to be equal.
    """
    content = parse_json(root)
    content["attributes"] = {k: v for k, v in content["attributes"].items() if k not in ("status", "digest")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Manifest(ExpectedFiles):
    """The manifests of a run, read when they are needed; `check` is safe in threads."""

    def __init__(self, storage: Storage, attributes: Mapping[str, Any], *, full: bool = False) -> None:
        super().__init__(storage, attributes)
        self._full = full
        self._read: dict[str, tuple[str, dict[str, Entry]]] = {}
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _metadata(self, key: str) -> bytes:
        self.check(key)
        return super()._metadata(key)

    def arrays_of(self, group: str) -> list[str]:
        """Return the names of the arrays that a group of the run was created with."""
        keys = (key.split("/", 1) for key in self.of(CREATED)[1] if key.endswith("/zarr.json"))
        return [rest.removesuffix("/zarr.json") for top, rest in keys if top == group and rest != "zarr.json"]

    def of(self, key: str) -> tuple[str, dict[str, Entry]]:
        """Return the digest and entries of one manifest."""
        with self._lock:
            if key not in self._read:
                self._read[key] = read(self._storage, key)
            return self._read[key]

    def digests(self, units: Iterable[int]) -> list[str]:
        """Return the digests of what was created and of these units: they change with the content of the run."""
        if self._complete:
            return [checksum.sha256 for _, checksum in sorted(self.of(COMPLETE)[1].items())]
        return [self.of(CREATED)[0], *(self.of(unit_key(unit))[0] for unit in units)]

    def find(self, key: str) -> Entry | None:
        """Return the entry of a file, or None if no manifest has to list it (a unit that is not committed, a flag)."""
        if key.startswith(("manifest/", "units/committed/c/")) or key == "zarr.json":
            return None
        array, separator, index = key.partition("/c/")
        if key.startswith("totals/"):
            return self._listed(COMPLETE, key) if self._complete and self._has_totals else None
        if not separator or array.startswith(("sequences/", "messages/")):
            return self.of(CREATED)[1].get(key)
        spec = self._specs.get(array)
        if spec is None:
            return None
        unit = self._unit(spec, int(index.split("/")[spec.axis]))
        return self._listed(unit_key(unit), key) if self._is_committed(unit) else None

    @cached_property
    def _has_totals(self) -> bool:
        """Return whether the run has totals: a finished one that was captured before there were any has none."""
        return any(key.startswith("totals/") for key in self.of(COMPLETE)[1])

    def _listed(self, manifest: str, key: str) -> Entry:
        try:
            return self.of(manifest)[1][key]
        except KeyError as error:
            raise DamageError(self._storage, f"{key} is not listed in {manifest}") from error

    def is_checked(self, key: str) -> bool:
        """Return whether the file passed `check` before."""
        return key in self._checked

    def check(self, key: str, data: bytes | None = None) -> None:
        """Refuse a file that is missing or not the one that was written. data: its content, if that was read already.

        Raises:
            DamageError: naming the file.
        """
        if key in self._checked:
            return
        known = self.find(key)
        if known is None:
            return
        if data is None and self._full:
            data = self._content(key, known)
        if data is None:
            size, tail = self._ending(key)
        else:
            size, tail = len(data), data[-TAIL_BYTES:]
        changed = (size, google_crc32c.value(tail)) != (known.size, known.tail)
        if changed or (self._full and entry([cast(bytes, data)]) != known):
            raise DamageError(self._storage, f"{key} is not the file that was written")
        self._checked.add(key)

    def _content(self, key: str, known: Entry | None) -> bytes:
        try:
            return self._storage.read(key, None if known is None else known.size)
        except OSError as error:
            raise self._unreadable(key, error) from error

    def _ending(self, key: str) -> tuple[int, bytes]:
        try:
            return self._storage.ending(key, TAIL_BYTES)
        except OSError as error:
            raise self._unreadable(key, error) from error

    def _unreadable(self, key: str, error: OSError) -> DamageError:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        return DamageError(self._storage, f"{key} {what}")

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file that is checked."""
        data = self._content(key, self.find(key))
        self.check(key, data)
        return data


class CheckedStore(WrapperStore[Any]):
    """What zarr reads a run through: every file passes `Manifest.check` before its first use."""

    manifest: Manifest | None = None
    expected: ExpectedFiles | None = None  # of a run without manifests
    _supports_sync_io = False  # zarr 3.3 and newer would read past the checks below

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self._refused: dict[str, str] = {}  # arrays whose chunks are not read → why

    def _with_store(self, store: Any) -> "CheckedStore":
        copy = CheckedStore(store)
        copy.manifest, copy.expected, copy._refused = self.manifest, self.expected, self._refused
        return copy

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        await self._check(key)
        buffer = await self._store.get(key, prototype, byte_range)
        if buffer is None:
            await self._refuse_missing(key)
        array, _, name = key.rpartition("/")
        if name == "zarr.json" and buffer is not None and (reason := _refusal_of_array(buffer.to_bytes())):
            self._refused[array] = reason
        return buffer

    def get_ranges(self, key: str, byte_ranges: Any, **options: Any) -> Any:
        """Return an iterator over ranges of a file, each read by `get`; zarr 3.3 and newer asks for them."""
        return Store.get_ranges(self, key, byte_ranges, **options)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        wanted = list(key_ranges)
        for key in dict.fromkeys(key for key, _ in wanted):
            await self._check(key)
        buffers: list[Buffer | None] = await self._store.get_partial_values(prototype, wanted)
        for (key, _), buffer in zip(wanted, buffers, strict=True):
            if buffer is None:
                await self._refuse_missing(key)
        return buffers

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    def folders(self, group: str) -> set[str]:
        """Return the names of what lies in a group, whether zarr recognizes it or not."""

        async def listed() -> set[str]:
            return {name.rstrip("/") async for name in self._store.list_dir(group)}

        return sync(listed()) - {"zarr.json"}

    def refusal(self, array: str) -> str:
        """Return why chunks of an array that was opened are not read, "" if they are."""
        return self._refused.get(array, "")

    async def _refuse_missing(self, key: str) -> None:
        """Refuse a chunk that is missing and that the layout of the run requires.

        Raises:
            DamageError: naming the file.
        """
        expected = self.manifest or self.expected
        if expected is not None and await asyncio.to_thread(expected.must_exist, key):
            raise DamageError(self._store, f"{key} is missing")

    async def _check(self, key: str) -> None:
        if isinstance(self._store, LocalStore):
            _refuse_special(self._store.root / key)
        for array, reason in self._refused.items():  # of no run as it was written, so there are none to look through
            if key.startswith(f"{array}/") and not key.endswith("/zarr.json"):
                raise DamageError(self._store, f"{array} {reason}")
        if self.manifest is not None and not self.manifest.is_checked(key):
            await asyncio.to_thread(self.manifest.check, key)


def _refusal_of_array(metadata: bytes) -> str:
    """Return why chunks of an array with this metadata are not read, "" if they are or if it is not an array."""
    try:
        about = parse_json(metadata)
        codecs = set(_codec_names(about["codecs"])) - _CODECS
        shape, chunk = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
        if codecs:
            return f"is packed by {min(codecs)!r}, which no array of a run is"
        if about["chunk_key_encoding"] != _KEYS or '"big"' in json.dumps(about["codecs"]):
            return "has files of other names or another byte order than the arrays of a run"
        if math.prod(chunk) > max(math.prod(shape), _SMALL_ARRAY):
            return f"has chunks of {math.prod(chunk):,} values, more than the array has"
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # zarr refuses it, or it is a group
    return ""


def _codec_names(codecs: Any) -> Iterator[str]:
    """Yield the names of codecs, and of those inside a shard."""
    for codec in codecs:
        yield str(codec["name"])
        for inner in ("codecs", "index_codecs"):
            yield from _codec_names((codec.get("configuration") or {}).get(inner, ()))


def _refuse_special(path: Path) -> None:
    """Check that zarr, which opens whatever lies at a path, waits for no pipe, reads no device and no absurd metadata.

    Raises:
        DamageError: it is one.
    """
    try:
        about = path.stat()
    except OSError:
        return  # missing: whether it may be is not decided here
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise DamageError(path, "it is a pipe, a device or a socket, not a file")
    if path.name == "zarr.json" and about.st_size > MAX_METADATA_BYTES:
        raise DamageError(path, f"it is larger than {MAX_METADATA_BYTES:,} bytes")
