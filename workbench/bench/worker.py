"""A process that holds one model for a measurement, beside others that hold the baselines."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workbench.child_processes import python
from workbench.errors import JobError


def overheads(run: Callable[[str], float], paths: Sequence[str], pairs: int) -> dict[str, list[float]]:
    """Return, for each path, ratios of its seconds and those of the path "plain" that ran just before or after.

    run: runs a path and returns its seconds. Ratios near 1 need many `pairs`: a slow second touches both of a pair.
    """
    every = ("plain", *paths)
    ratios: dict[str, list[float]] = {path: [] for path in paths}
    for turn in range(pairs):
        seconds = {path: run(path) for path in (every if turn % 2 else every[::-1])}
        for path in paths:
            ratios[path].append(seconds[path] / seconds["plain"])
    return ratios


def peak_bytes(pid: int | None = None) -> int:
    """Return the most memory that a process has had, this one by default.

    Linux's `getrusage` also counts what the process that started this one had: it is asked on other systems only.
    """
    status = Path(f"/proc/{'self' if pid is None else pid}/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert pid is None, "only Linux has a file with the memory of another process"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Worker:
    """A process that holds one model and runs it on request."""

    def __init__(
        self, name: str, checkpoint: Path, threads: int, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.name = name
        command = python("-m", "workbench.bench.cpu", name, str(checkpoint))
        # A waiting process must not spin: it would take the core from the one that is measured.
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"}
        env |= environment
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        self.load_s: float = self._answer()["load_s"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # at the end of its input a worker ends

    def run(self, path: str, tokens: int, /, **options: Any) -> dict[str, float]:
        """Return seconds of one forward pass, and the most memory this process has ever had, in bytes."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([path, tokens, options]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise JobError(f"the {self.name} process ended; its output is above")
        return json.loads(line)
