"""A process that starts captures and kills them: `python -m tests.capture.killing TRANSCRIPTS FOLDER KILLS SEED`.

Children are forked off a process that has the model loaded, so a kill costs a fraction of a second and falls anywhere
between the first file of a run and the last. A run that gets to its end is left for the test, and the next begins.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

import workbench as wb
from workbench.capture import compute, job, pipeline  # noqa: F401  loaded before the first fork

RECORD = ["routing", "sinks", "logprobs", "resid_post:1,3", "mlp_out:2 channel=final"]


def main(transcripts: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # what is forked has no other threads
    model = wb.load("nano", dtype=torch.float32)
    rng = np.random.default_rng(seed)
    killed = runs = 0
    longest = 0.0
    while killed < kills:
        path = folder / f"run-{runs}"
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = 3
            try:
                wb.capture(model, transcripts, path, record=RECORD, unit_tokens=1024)
                code = 0
            finally:
                os._exit(code)
        wait = rng.uniform(0, longest) if longest else 600.0
        status = _ends_within(child, wait)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
        elif status == 0:
            longest, runs = max(longest, time.monotonic() - begun), runs + 1
        else:
            raise SystemExit(f"a capture failed by itself: status {status}")
    print(f"{killed} kills, {runs} runs")


def _ends_within(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
