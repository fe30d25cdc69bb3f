"""Full size on one machine: a model in gpt-oss-20b's shape loads, generates and captures, and its memory is counted.

The weights are random. The work is done in a process of its own, whose memory is counted in two ways: all that is
resident, the checkpoint's pages included, which the system may drop and read again whenever it needs the room; and
what the process itself has asked for, which it may not.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from workbench.bench.worker import peak_bytes
from workbench.capture.job import capture
from workbench.child_processes import python
from workbench.errors import JobError
from workbench.harmony.transcripts import Transcript, write_transcripts
from workbench.model import load
from workbench.model.config import PUBLISHED, Config
from workbench.model.export import save_random

_STATUS = Path("/proc/self/status")


def run(
    checkpoint: str | Path | None = None,
    *,
    cfg: Config = PUBLISHED["20b"],
    tokens: int = 1024,
    new: int = 8,
    device: str = "cpu",
    limit: int = 18 * 10**9,
) -> dict[str, Any]:
    """Load, generate `new` tokens, capture a sequence of `tokens`; a peak of `limit` bytes or more is a JobError.

    checkpoint: as `load` takes it; without one, a random model of `cfg` is made in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        folder = checkpoint or save_random(Path(scratch) / "random", cfg)
        made_s = time.perf_counter() - start
        command = python("-m", "workbench.bench.full", str(folder), scratch, str(tokens), str(new), device)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise JobError(f"the model's process ended with {done.returncode}; its output is above")
    result: dict[str, Any] = {"made_s": made_s if checkpoint is None else None, **json.loads(done.stdout)}
    for name in ("load_s", "generate_s", "capture_s"):
        print(f"{name.removesuffix('_s'):9}{result[name]:8.1f} s")
    print(f"resident at most {result['peak_bytes'] / 1e9:.2f} GB, the checkpoint's pages included")
    for name, where in (("own", "of its own"), ("gpu", "on the GPU")):
        if result[f"{name}_bytes"] is not None:
            print(f"{where} at most {result[f'{name}_bytes'] / 1e9:.2f} GB")
    if result["peak_bytes"] >= limit:
        raise JobError(f"the peak of {result['peak_bytes'] / 1e9:.2f} GB is not below {limit / 1e9:.2f} GB")
    return result


class OwnMemory(threading.Thread):
    """The largest memory that is not a file's, read twenty times a second; None where the system does not state it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: int | None = None

    def run(self) -> None:
        """Look, until the process ends."""
        while (now := self.now()) is not None:
            self.peak = max(self.peak or 0, now)
            time.sleep(0.05)

    @staticmethod
    def now() -> int | None:
        """Return the bytes at this moment."""
        if not _STATUS.exists():
            return None
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024


def _work(folder: str, scratch: str, tokens: str, new: str, device: str) -> dict[str, Any]:
    own = OwnMemory()
    own.start()
    times = [time.perf_counter()]
    model = load(folder, device=device)
    times.append(time.perf_counter())
    # Random digits are a thousand different tokens, or in a small vocabulary at least some: many experts are hit.
    ids = model.to_tokens("".join(random.Random(0).choices("0123456789 ", k=5 * int(tokens))))[0, : int(tokens)].cpu()
    assert len(ids) == int(tokens)
    generated = model.generate([ids[:16].tolist()], max_new_tokens=int(new), stop=())[0]
    assert len(generated) == int(new)
    times.append(time.perf_counter())
    transcripts = Path(scratch) / "transcripts.jsonl"
    write_transcripts(transcripts, [Transcript("a", "a", "", ids.int().numpy(), 1)])
    captured = capture(model, transcripts, Path(scratch) / "run.zarr")
    assert not captured.provenance["rejects"]
    times.append(time.perf_counter())
    peak = peak_bytes()
    gpu = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    load_s, generate_s, capture_s = (b - a for a, b in itertools.pairwise(times))
    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load_s": load_s,
        "generate_s": generate_s,
        "capture_s": capture_s,
        "peak_bytes": peak,
        "own_bytes": own.peak,
        "gpu_bytes": gpu,
    }


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:])))
