"""One writer at a time: locks for a local file or folder and for a prefix of an object store.

A local lock is `flock` on `.NAME.lock` beside the target, so it exists before the target does and the kernel releases
it when its holder ends, however it ends. An object store has no such lock: there the lock is an object that only one
conditional put can create, with a nonce of its owner, and only the owner or the one job that claimed that nonce after
the owner's death deletes it.

    with Lock(place("run.zarr")):
        …

Reference: flock(2); the check of the inode after locking makes it safe to remove the file.
"""

import errno
import fcntl
import json
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import InputError

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def process_start(pid: int) -> str | None:
    """Return when a process of this host began (None: not running), which tells a reused process id apart."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]
    except OSError:  # no /proc on this system: the pid alone has to do
        return ""


def _process_namespace() -> str:
    """Return what tells process ids of two containers on one host apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _owner() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "process_start": process_start(os.getpid()),
        "namespace": _process_namespace(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "nonce": uuid.uuid4().hex,
    }


def _refusal(target: object, owner: dict[str, Any], remedy: str) -> InputError:
    return InputError(
        f"{target} is being written by process {owner.get('process', 'unknown')} on {owner.get('host', 'this host')} "
        f"since {owner.get('since', 'just now')}; {remedy}"
    )


class _Held(Protocol):
    def acquire(self) -> None: ...

    def release(self) -> None: ...


class _Lockable(Protocol):
    def lock(self) -> _Held: ...


class _Objects(Protocol):  # what a lock needs of a storage, which itself imports this module
    def read(self, key: str) -> bytes: ...

    def create(self, key: str, data: bytes) -> bool: ...

    def delete(self, key: str) -> None: ...


class Lock:
    """Held from `acquire` to `release`; a second holder is refused with the first one's host, process and time.

    Raises:
        InputError: another job holds the lock, or the file system has no locks.
    """

    def __init__(self, storage: _Lockable) -> None:
        self._held: _Held = storage.lock()

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock."""
        self._held.acquire()

    def release(self) -> None:
        """Give the lock back, if this object holds it."""
        self._held.release()


class FileLock:
    """`flock` on a file beside `target`, under the target's real name: symbolic links to one run share one lock."""

    def __init__(self, target: str | Path) -> None:
        self._target = target
        real = Path(os.path.realpath(target))
        self.path = real.with_name(f".{real.name}{LOCK}")
        self._descriptor: int | None = None

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Lock the file, and lock again if the file was removed between opening and locking."""
        while self._descriptor is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                raise InputError(f"{self._target} cannot be locked: {self.path}: {error.strerror}") from error
            if self._locked(descriptor):
                self._descriptor = descriptor
        record = json.dumps(_owner()).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, record, 0)

    def _locked(self, descriptor: int) -> bool:
        """Whether the descriptor is locked and still the file of that name; closed otherwise."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, named = os.fstat(descriptor), os.stat(self.path, follow_symlinks=False)
            if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
                return True
        except BlockingIOError:
            os.close(descriptor)
            raise _refusal(self._target, self._read_owner(), "wait for it to finish, or stop it first") from None
        except FileNotFoundError:  # removed by the previous holder
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                raise InputError(
                    f"{self._target} cannot be locked: its file system has no file locks ({error.strerror}); "
                    "write to another file system, or mount this one with locks"
                ) from error
            raise
        os.close(descriptor)
        return False

    def _read_owner(self) -> dict[str, Any]:
        """Return what the holder wrote; it may be a moment late."""
        for _ in range(20):
            with suppress(OSError, ValueError):
                owner = json.loads(self.path.read_bytes())
                if isinstance(owner, dict):
                    return owner
            time.sleep(0.005)
        return {}

    def release(self) -> None:
        """Remove the file while it is locked, then unlock it."""
        if self._descriptor is None:
            return
        with suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


class ObjectLock:
    """An object that one conditional put creates; its nonce says whose it is."""

    def __init__(self, storage: _Objects) -> None:
        self._storage = storage
        self._nonce = ""

    def acquire(self) -> None:
        """Create the lock object, after removing that of an owner that is dead."""
        owner = _owner()
        for _ in range(3):
            if self._storage.create(LOCK, json.dumps(owner).encode()):
                self._nonce = owner["nonce"]
                return
            self._remove_if_dead()
        raise InputError(f"{self._storage} cannot be locked: other jobs took it at the same moment; try again")

    def _remove_if_dead(self) -> None:
        """Delete the lock of a dead owner. A claim of its nonce, which one job gets, keeps others from doing the same.

        A lock with that nonce cannot come back, so the claimant that still reads the nonce deletes the right lock.
        """
        found = self._read_owner()
        if found is None:
            return
        remedy = f"wait for it to finish, or delete {self._storage}/{LOCK} if you know that it has ended"
        same_host = found.get("host") == platform.node() and found.get("namespace", "") in ("", _process_namespace())
        if not same_host or process_start(_number(found.get("process"))) == found.get("process_start"):
            raise _refusal(self._storage, found, remedy)
        claim = f"{LOCK}.{found.get('nonce', '')}"
        if not self._storage.create(claim, json.dumps(_owner()).encode()):
            raise _refusal(self._storage, found, f"{remedy}, and {self._storage}/{claim} with it")
        try:
            if (again := self._read_owner()) and again.get("nonce") == found.get("nonce"):
                self._storage.delete(LOCK)
        finally:
            self._storage.delete(claim)

    def _read_owner(self) -> dict[str, Any] | None:
        """Return the owner, or None if the lock is gone. An object is written whole, so no JSON is no lock of ours."""
        try:
            owner = json.loads(self._storage.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            owner = {}
        return owner if isinstance(owner, dict) and owner.get("nonce") else {"host": "an unknown host"}

    def release(self) -> None:
        """Delete the lock object, if its nonce is ours."""
        if not self._nonce:
            return
        found = self._read_owner()
        if found is not None and found.get("nonce") == self._nonce:
            self._storage.delete(LOCK)
        self._nonce = ""


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 2**31
