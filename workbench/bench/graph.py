"""Time and memory of an attribution graph: a checkpoint, or random weights in the shape of gpt-oss-20b.

The work is done in a process of its own. Memory is what a graph needs beyond the loaded model: the most that the
process itself has asked for, files not counted, less what it had before; on a GPU the same of the allocator.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from workbench.bench.full import OwnMemory
from workbench.child_processes import python
from workbench.counting import count_of
from workbench.errors import JobError
from workbench.experiments.attribution_graph import graph
from workbench.model import load
from workbench.model.config import PUBLISHED
from workbench.model.export import save_random


def run(
    checkpoint: str | None = None, *, tokens: int = 256, layers: int | None = None, device: str = "cpu", rounds: int = 2
) -> dict[str, Any]:
    """Return seconds of each of `rounds` graphs of one target, and the most bytes they needed beyond the model.

    `processor_s` counts the time of all threads on their cores, which other programs do not lengthen.

    checkpoint: as `load` takes it; by default random weights in the shape of 20b, with its first `layers` layers.

    Raises:
        JobError: the measuring process fails, as when the memory does not suffice.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint
        if source is None:
            cfg = PUBLISHED["20b"]
            n_layers = layers or cfg.n_layers
            cfg = replace(cfg, n_layers=n_layers, windows=cfg.windows[:n_layers])
            source = str(save_random(Path(scratch) / "random", cfg))
        command = python("-m", "workbench.bench.graph", source, str(tokens), device, str(rounds))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise JobError(f"the measuring process ended with {done.returncode}; its output is above")
    result: dict[str, Any] = json.loads(done.stdout)
    shown, used = (", ".join(f"{seconds:.2f}" for seconds in result[name]) for name in ("graph_s", "processor_s"))
    print(f"{result['layers']} layers, {tokens} tokens, one target: {shown} s on {result['device']}")
    print(f"processor time, other programs not counted: {used} s")
    print(
        f"{result['nodes']} of {count_of(result['nodes_in_pass'], 'node')}; completeness "
        f"{result['completeness']:.1e} logits"
    )
    if result["extra_bytes"] is not None:
        print(f"{result['extra_bytes'] / 1e9:.2f} GB beyond the loaded model")
    return result


def _work(source: str, tokens: str, device: str, rounds: str) -> dict[str, Any]:
    model = load(source, device=device, dtype=torch.bfloat16 if source != "nano" else torch.float32)
    # Random digits are a thousand different tokens, or in a small vocabulary at least some: many experts are hit.
    text = "".join(random.Random(0).choices("0123456789", k=5 * int(tokens)))
    ids = model.to_tokens(text)[0, : int(tokens)]
    own = OwnMemory()
    before, peak = own.now(), None
    own.start()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds, processor = [], []
    for _ in range(int(rounds)):
        begun, used = time.perf_counter(), time.process_time()
        made = graph(model, ids)
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    peak = torch.cuda.max_memory_allocated() if on_gpu else own.peak
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU with {len(os.sched_getaffinity(0))} cores",
        "threads": torch.get_num_threads(),
        "layers": model.cfg.n_layers,
        "tokens": len(ids),
        "graph_s": seconds,
        "processor_s": processor,
        "extra_bytes": None if peak is None or before is None else peak - before,
        "nodes": len(made.nodes),
        "nodes_in_pass": made.metadata["nodes_in_pass"],
        "completeness": made.metadata["completeness_of_paths"],
    }


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:])))
