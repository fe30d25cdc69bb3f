"""One writer at a time: locks for a local file or folder and for a prefix of an object store.

A local lock is `workbench.file_lock`. An object store has no such lock: there the lock is an object that only one
conditional put can create, with a nonce of its owner, and only the owner or the one job that claimed that nonce after
the owner's death deletes it.

    with Lock(storage_at("run.zarr")):
        …
"""

import json
import platform
from typing import Any, Protocol

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.file_lock import LOCK, FileLock, owner, process_namespace, process_start, refusal

__all__ = ["LOCK", "FileLock", "Lock", "ObjectLock"]


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


class ObjectLock:
    """An object that one conditional put creates; its nonce identifies the owner."""

    def __init__(self, storage: _Objects) -> None:
        self._storage = storage
        self._nonce = ""

    def acquire(self) -> None:
        """Create the lock object, after the removal of a stale lock.

        Raises:
            InputError: other jobs hold the lock.
        """
        record = owner()
        for _ in range(3):
            if self._storage.create(LOCK, json.dumps(record).encode()):
                self._nonce = record["nonce"]
                return
            self._remove_if_dead()
        raise InputError(f"{self._storage} cannot be locked: other jobs locked it at the same moment: try again")

    def _remove_if_dead(self) -> None:
        """Delete the lock of a dead owner. A claim of its nonce, which one job gets, keeps others from doing the same.

        A lock with that nonce cannot come back, so the claimant that still reads the nonce deletes the right lock.
        """
        holder = self._read_owner()
        if holder is None:
            return
        remedy = f"wait for it to finish, or delete {self._storage}/{LOCK} if you know that it has ended"
        same_host = holder.get("host") == platform.node() and holder.get("namespace", "") in ("", process_namespace())
        if not same_host or process_start(_number(holder.get("process"))) == holder.get("process_start"):
            raise refusal(self._storage, holder, remedy)
        claim = f"{LOCK}.{holder.get('nonce', '')}"
        if not self._storage.create(claim, json.dumps(owner()).encode()):
            raise refusal(self._storage, holder, f"{remedy}, and {self._storage}/{claim} with it")
        try:
            if (again := self._read_owner()) and again.get("nonce") == holder.get("nonce"):
                self._storage.delete(LOCK)
        finally:
            self._storage.delete(claim)

    def _read_owner(self) -> dict[str, Any] | None:
        """Return the owner; None if the lock is gone. Objects are complete, so what is not JSON is not our lock."""
        try:
            holder = parse_json(self._storage.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            holder = {}
        return holder if isinstance(holder, dict) and holder.get("nonce") else {"host": "an unknown host"}

    def release(self) -> None:
        """Delete the lock object, if its nonce is ours."""
        if not self._nonce:
            return
        owner = self._read_owner()
        if owner is not None and owner.get("nonce") == self._nonce:
            self._storage.delete(LOCK)
        self._nonce = ""


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 2**31
