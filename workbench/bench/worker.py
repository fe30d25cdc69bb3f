"""A process that holds one model for a measurement, beside others that hold the baselines."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workbench.child_processes import python
from workbench.errors import JobError


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
