"""A lock of this machine: one process at a time writes a file or folder.

`flock` on `.NAME.lock` beside the target, so the lock exists before the target does and the kernel releases it when
its holder ends, however it ends.

Reference: flock(2); the check of the inode after locking makes it safe to remove the file.
"""

import errno
import json
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError as error:
    raise ImportError(
        "files are locked with flock, which Windows lacks: install and run the workbench in WSL"
    ) from error

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.signals import interruptions_wait

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def process_start(pid: int) -> str | None:
    """Return when a process of this host began (None: not running), which identifies a reused process id."""
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


def process_namespace() -> str:
    """Return an identifier of the process namespace, which differs between two containers on one host."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def owner() -> dict[str, Any]:
    """Return the record that a lock file holds about the process that holds it."""
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "process_start": process_start(os.getpid()),
        "namespace": process_namespace(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "nonce": uuid.uuid4().hex,
    }


def refusal(target: object, holder: dict[str, Any], remedy: str) -> InputError:
    """Return the error that names the holder of a lock."""
    return InputError(
        f"{target} is being written by process {holder.get('process', 'unknown')} on {holder.get('host', 'this host')} "
        f"since {holder.get('since', 'just now')}; {remedy}"
    )


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
        """Lock the file, and lock again if the file was removed between opening and locking.

        Raises:
            InputError: the file cannot be created or locked.
        """
        try:
            with interruptions_wait():  # between a call and the use of what it returns
                self._acquire()
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        while self._descriptor is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                raise InputError(f"{self._target} cannot be locked: {self.path}: {error.strerror}") from error
            if self._locked(descriptor):
                self._descriptor = descriptor
        record = json.dumps(owner()).encode()
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, record, 0)
        except OSError as error:  # a full disk
            raise InputError(f"{self._target} cannot be locked: {self.path}: {error.strerror}") from error

    def _locked(self, descriptor: int) -> bool:
        """Return whether the descriptor is locked and still the file of that name; closed otherwise."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, on_disk = os.fstat(descriptor), os.stat(self.path, follow_symlinks=False)
            if (opened.st_dev, opened.st_ino) == (on_disk.st_dev, on_disk.st_ino):
                return True
        except BlockingIOError:
            os.close(descriptor)
            raise refusal(self._target, self._read_owner(), "wait for it to finish, or stop it first") from None
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
        """Return the record that the holder wrote, waiting a moment for it; an empty one if there is none."""
        for _ in range(20):
            with suppress(OSError, ValueError):
                holder = parse_json(self.path.read_bytes())
                if isinstance(holder, dict):
                    return holder
            time.sleep(0.005)
        return {}

    def release(self) -> None:
        """Remove the file while it is locked, then unlock it."""
        with interruptions_wait():
            if self._descriptor is None:
                return
            try:
                with suppress(FileNotFoundError):
                    self.path.unlink()
            finally:
                os.close(self._descriptor)
                self._descriptor = None
