"""One job a run: a lock file that says who holds it, and that a dead holder gives up.

In an object store it is as good as the store's conditional puts; a holder on another host can only be taken for alive.
"""

import json
import os
import platform
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.runs.storage import Storage

LOCK = ".lock"


def process_start(pid: int) -> str | None:
    """When a process of this host began (None: it is not running), so that a reused pid is not taken for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]
    except OSError:  # no /proc on this system: the pid alone has to do
        return ""


class Lock:
    """Held from `acquire` to `release`; a second holder is refused with the first's host, process and time."""

    def __init__(self, place: "Storage") -> None:
        self.place = place

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, over a dead holder's if need be."""
        me = {
            "host": platform.node(),
            "process": os.getpid(),
            "process_start": process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "nonce": uuid.uuid4().hex,
        }
        for _ in range(2):
            if self.place.create(LOCK, json.dumps(me).encode()):
                return
            self._break_if_dead()
        raise InputError(f"{self.place} cannot be locked: another job took it at the same moment; try again")

    def _break_if_dead(self) -> None:
        holder = self._holder()
        alive = holder.get("host") != platform.node() or (
            process_start(int(holder.get("process", 0))) == holder.get("process_start")
        )
        if alive:
            raise InputError(
                f"{self.place} is being written by process {holder.get('process')} on {holder.get('host')} since "
                f"{holder.get('since')}; wait for it, or delete {self.place}/{LOCK} if you know it is gone"
            )
        self.place.delete(LOCK)

    def _holder(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.place.read(LOCK))
        except (OSError, ValueError):  # released just now, or its writer died while writing it
            return {"host": platform.node(), "process": 0, "process_start": "never"}
        return found

    def release(self) -> None:
        """Give it back."""
        self.place.delete(LOCK)
