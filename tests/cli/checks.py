"""What must hold of every command, whatever it is given.

A command ends with exit code 0, 1 or 2, never with a traceback. It changes no file that it did not write, writes
nothing when it is refused, and leaves no file that is half written.
"""

import contextlib
import io
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.cli.running import Result, run_command, snapshot

LIMIT_S = 300.0  # a command that takes so long waits for something that never comes
_MEMORY_BYTES = 6 * 2**30  # that a command may add to the address space of the tests
_HALF_WRITTEN = re.compile(r"\.(staging|part|lock|creating|partial|old)(/|$)")


class TooLongError(BaseException):
    """The command waits; no command may catch this, as some catch every `Exception` of a damaged file."""


class Checked:
    """Runs commands in a folder and checks the files that each leaves; the folder is then restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = snapshot(folder)

    def run(
        self,
        *arguments: str,
        may_change: str = "",
        within: contextlib.AbstractContextManager[object] | None = None,
        codes: tuple[int, ...] = (0, 1, 2),
        out: io.TextIOBase | None = None,
    ) -> Result:
        """Return how a command ended. may_change: an output that exists, which it may complete.

        within: a context in which the command runs. codes: those that it may end with. out: its standard output.
        """
        with limits(), within or contextlib.nullcontext():
            done = run_command(*arguments, out=out)
        after = snapshot(self.folder)
        owned = {name for name in self._before if may_change and name.split("/")[0] == may_change}
        changed = [n for n, what in self._before.items() if after.get(n) != what and (done.code == 2 or n not in owned)]
        new = sorted(after.keys() - self._before.keys())
        for name in new:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        assert not done.problem(codes=codes), (arguments, done.problem(codes=codes))
        assert not changed, (arguments, changed)
        assert not new or done.code != 2, (arguments, done.err, new)
        assert not [name for name in new if _HALF_WRITTEN.search(name)], (arguments, new)
        return done


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let a command that waits for ever, or asks for absurd memory, fail here and not the machine."""

    def stop(*_: object) -> None:
        raise TooLongError(f"the command did not end within {LIMIT_S:.0f} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
