"""The storage of a run: a local folder, or a prefix of object storage, given as an fsspec URL.

A key is a path inside the run, with slashes. In a folder a run is written beside its path and renamed; an object
store cannot rename, so there the root's `zarr.json`, without which nothing is a run, is the last object to be put.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import InputError
from workbench.inputs import open_regular
from workbench.outputs import replace_folder, staging_folder
from workbench.runs.lock import LOCK, FileLock, ObjectLock

ROOT = "zarr.json"
_CREATING = ".creating"
_MEMORY = threading.Lock()  # memory:// looks and writes in two steps
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # of pip install 'gpt-oss-workbench[…]'


class Storage(Protocol):
    """The operations that a run needs of its storage; `str` of it is the path or URL that the user gave."""

    def store(self) -> Any:
        """Return the store that zarr opens."""

    def exists(self, key: str = "") -> bool:
        """Return whether the key, or anything below it, exists."""

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: it does not exist.
            OSError: it cannot be read, is larger than `max_bytes`, or is not a regular file.
        """

    def ending(self, key: str, length: int) -> tuple[int, bytes]:
        """Return a file's size and its last bytes, at most `length`; FileNotFoundError if it is not there."""

    def put(self, key: str, parts: Iterable[bytes]) -> None:
        """Write a complete file; an existing one is replaced."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a file and return True, or return False if it exists."""

    def delete(self, key: str) -> None:
        """Remove a file if it exists."""

    def files(self) -> set[str]:
        """Return every file of the run, locks left out."""

    def lock(self) -> FileLock | ObjectLock:
        """Return a lock that is not held yet."""

    def new(self) -> AbstractContextManager[Path]:
        """Yield a local folder to fill, which becomes the run when it is complete. The caller holds the lock."""


def storage_at(path: "str | Path | Storage") -> Storage:
    """Return the storage at a path or URL.

    Raises:
        InputError: the scheme is unknown or its package is not installed.
    """
    if not isinstance(path, str | Path):
        return path
    scheme, separator, rest = str(path).partition("://")
    if not separator or scheme == "file":
        return LocalStorage(Path(rest if separator else path))
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise InputError(
            f"{path}: unknown scheme {scheme!r}; expected a local folder, or a URL that begins with s3://, gs://, "
            "az:// or memory://"
        )
    if scheme in ("http", "https"):
        raise InputError(
            f"{path}: a web server cannot list a run's files: copy the run, or give its s3:// or gs:// URL"
        )
    try:
        fs = fsspec.filesystem(scheme)
    except ImportError as error:
        remedy = f"pip install 'gpt-oss-workbench[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise InputError(f"{path}: {scheme}:// needs a package that is not installed: {remedy}") from error
    return ObjectStorage(str(path).rstrip("/"), fs)


def _refuse_larger(key: str, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than the {max_bytes:,} bytes that it should have", key)


class LocalStorage:
    """A run in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def store(self) -> str:
        return str(self.path)

    def exists(self, key: str = "") -> bool:
        target = self.path / key
        return target.exists() and (not target.is_dir() or any(target.iterdir()))

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        with open_regular(self.path / key) as file:
            _refuse_larger(key, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    def ending(self, key: str, length: int) -> tuple[int, bytes]:
        with open_regular(self.path / key) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            return size, file.read()

    def put(self, key: str, parts: Iterable[bytes]) -> None:
        target = self.path / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            file.writelines(parts)

    def create(self, key: str, data: bytes) -> bool:
        """Write beside and link: the file appears with all of its content, for one of several that try."""
        target = self.path / key
        descriptor, staging = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.link(staging, target)
        except FileExistsError:
            return False
        finally:
            os.unlink(staging)
        return True

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def files(self) -> set[str]:
        keys, folders = set(), [""]
        while folders:
            folder = folders.pop()
            with suppress(OSError), os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if not entry.is_dir():
                        keys.add(folder + entry.name)
                    elif not entry.is_symlink():
                        folders.append(f"{folder}{entry.name}/")
        return {key for key in keys if not key.startswith(LOCK)}

    def lock(self) -> FileLock:
        return FileLock(self.path)

    @contextmanager
    def new(self) -> Iterator[Path]:
        """Yield a folder as the protocol has it.

        Raises:
            InputError: a killed job was replacing the run, which is now moved back.
        """
        there = self.exists()
        with staging_folder(self.path) as folder:
            if self.exists() and not there:
                raise InputError(f"{self} is back, which a killed job was about to replace: run the command again")
            part = folder / self.path.name
            yield part
            replace_folder(part, self.path, folder)


class ObjectStorage:
    """A run in an object store, or in this process' memory (memory://).

    Raises:
        InputError: the object store cannot be opened, or holds something else than a run.
    """

    def __init__(self, url: str, fs: Any) -> None:
        self.url, self.fs = url, fs
        self.prefix = fs._strip_protocol(url)

    def __str__(self) -> str:
        return self.url

    def _at(self, key: str) -> str:
        return f"{self.prefix}/{key}" if key else self.prefix

    def store(self) -> Any:
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(self.url)

    def exists(self, key: str = "") -> bool:
        self.fs.invalidate_cache()
        try:
            return bool(self.fs.exists(self._at(key)))
        except Exception as error:  # each storage's client raises errors of its own
            why = str(error) or type(error).__name__
            raise InputError(
                f"{self} cannot be opened: {why}; credentials and the endpoint come from the environment"
            ) from error

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            return bytes(self.fs.cat_file(self._at(key)))
        data = bytes(self.fs.cat_file(self._at(key), start=0, end=max_bytes + 1))
        _refuse_larger(key, len(data), max_bytes)
        return data

    def ending(self, key: str, length: int) -> tuple[int, bytes]:
        self.fs.invalidate_cache()
        size = int(self.fs.size(self._at(key)))
        return size, bytes(self.fs.cat_file(self._at(key), start=max(0, size - length)))

    def put(self, key: str, parts: Iterable[bytes]) -> None:
        self.fs.pipe_file(self._at(key), b"".join(parts))

    def create(self, key: str, data: bytes) -> bool:
        """Create a file, atomically where the store has conditional puts (S3); reading again shows who won."""
        try:
            with _MEMORY if self.url.startswith("memory://") else nullcontext():
                self.fs.pipe_file(self._at(key), data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            if self.exists(key):
                return False
            raise
        return self.read(key) == data

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(key))

    def files(self) -> set[str]:
        self.fs.invalidate_cache()
        keys = {name[len(self.prefix) + 1 :] for name in self.fs.find(self.prefix)}
        return {key for key in keys if not key.startswith(LOCK)}

    def lock(self) -> ObjectLock:
        return ObjectLock(self)

    @contextmanager
    def new(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            there = self.files()
            if there and not there & {_CREATING, ROOT}:
                raise InputError(f"{self} holds something that is not a run ({min(there)}): choose another path")
            yield Path(folder)
            # of an earlier run, which the caller was told to replace, its root last: without it, it is not a run
            for key in [*(there - {ROOT, _CREATING}), *(there & {ROOT})]:
                self.delete(key)
            self.put(_CREATING, [b""])
            files = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
            for key in [*(name for name in files if name != ROOT), ROOT]:
                self.put(key, [(Path(folder) / key).read_bytes()])
            self.delete(_CREATING)
