"""Decoding on the CPU: the compiled kernels beside torch on the same weights, turn by turn in one run."""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from workbench.bench.table import processor
from workbench.bench.worker import Worker
from workbench.kernels import cpu

BATCHES = (1, 8)
STEPS = 4  # of one measurement
CONTEXT = 128
KERNELS = ("compiled", "torch")


class Decoder:
    """Decodes `STEPS` tokens a row behind the same prompts, as often as it is called."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[int, Any] = {}

    def __call__(self, tokens: torch.Tensor) -> None:
        """Decode as many rows as there are tokens."""
        from workbench.model.cache import KVCache

        model, batch = self._model, tokens.shape[1]
        if batch not in self._caches:
            cache = KVCache(model.cfg, batch, CONTEXT + STEPS, dtype=model.dtype, device=model.device)
            prompts = torch.arange(batch * CONTEXT).reshape(batch, CONTEXT) % model.cfg.d_vocab
            model.residual(prompts, cache=cache)
            self._caches[batch] = cache
        cache = self._caches[batch]
        cache.truncate(torch.full((batch,), CONTEXT))
        for _ in range(STEPS):
            model.unembed(model.ln_final(model.residual(tokens.mT, cache=cache)))


def measure(checkpoint: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Return tokens a second of both kernels at every batch, and the median of the ratios of neighbouring passes."""
    seconds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("workbench", checkpoint, threads, {cpu.VARIABLE: name}))
            for name in KERNELS
        }
        for turn in range(rounds + 1):
            for batch in BATCHES:
                for name in KERNELS if turn % 2 else KERNELS[::-1]:
                    answer = workers[name].run("decode", batch)
                    if turn:
                        seconds.setdefault((name, batch), []).append(answer["seconds"])
    rows = []
    for batch in BATCHES:
        ours, torchs = (seconds[name, batch] for name in KERNELS)
        row: dict[str, Any] = {"batch": batch, "context": CONTEXT}
        row |= {f"{name}_tokens_per_s": STEPS * batch / statistics.median(seconds[name, batch]) for name in KERNELS}
        row["speed_beside_torch"] = statistics.median(b / a for a, b in zip(ours, torchs, strict=True))
        rows.append(row)
    return {
        "threads": threads,
        "rounds": rounds,
        "processor": processor(),
        "measured": time.strftime("%Y-%m-%d"),
        "decode": rows,
    }


def run(checkpoint: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Measure and print."""
    result = measure(checkpoint, rounds, threads)
    print(
        f"decoding, {result['processor']}, {threads} threads, {CONTEXT} tokens of context, kernels {cpu.description()}"
    )
    for row in result["decode"]:
        compiled, reference = (row[f"{name}_tokens_per_s"] for name in KERNELS)
        print(
            f"  batch {row['batch']}: {compiled:.1f} tokens/s, torch {reference:.1f} tokens/s, "
            f"{row['speed_beside_torch']:.2f} × (median of ratios)"
        )
    return result
