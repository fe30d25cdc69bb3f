"""Decoding on the CPU: the compiled kernels beside torch, transformers and llama.cpp, turn by turn in one run.

All of them have the same weights. llama.cpp takes part where `llama_cpp` (llama-cpp-python, built when it is installed)
or `xllamacpp` (wheels) is installed, with one row: it reads a GGUF file that is written for it. transformers multiplies
by experts that it has unpacked to bfloat16.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.bench.table import markdown, processor
from workbench.bench.worker import Worker, overheads
from workbench.counting import signed
from workbench.kernels import cpu
from workbench.model.config import Config
from workbench.progress import progress

BATCHES = (1, 8)
CONTEXTS = (128, 4096)
STEPS = 16  # of one measurement, the first of which has hooks that were put there just before it
HOOKED = ("recorded", "edited")
PAIRS = 5  # of measurements with hooks and without, in every round
_BASELINES = {"torch": ("workbench",), "transformers": ("transformers",), "llama.cpp": ("llama_cpp", "xllamacpp")}
_SPEED_BYTES = 2**29


def steps(tokens: Int[Tensor, "1 row"], d_vocab: int) -> Iterator[Int[Tensor, "row 1"]]:
    """Yield the tokens of each step: others in every step, as they meet other experts, which no cache holds yet."""
    for n in range(STEPS):
        yield (tokens.mT + 509 * n) % d_vocab


class Decoder:
    """Decodes `STEPS` tokens for each row after prompts of a length, as often as it is called."""

    def __init__(self, model: Any, hooks: dict[str, Callable[[], Any]]) -> None:
        self._model, self._hooks = model, hooks
        self._caches: dict[tuple[int, int], Any] = {}

    def __call__(self, tokens: torch.Tensor, context: int, path: str = "plain") -> dict[str, float]:
        """Decode as many rows as there are tokens; return how many experts a layer and step had slots in."""
        model, batch = self._model, tokens.shape[1]
        if (batch, context) not in self._caches:
            self._caches[batch, context] = self._filled(batch, context)
        cache = self._caches[batch, context]
        cache.truncate(torch.full((batch,), context))
        hit: list[int] = []

        def count(experts: torch.Tensor, hook: Any) -> None:
            hit.append(len(experts.unique()))

        counting = [(f"blocks.{n}.mlp.hook_expert_indices", count) for n in range(model.cfg.n_layers)]
        with model.hooks(fwd_hooks=counting) if path == "counted" else self._hooks[path]():
            for new in steps(tokens, model.cfg.d_vocab):
                model.unembed(model.ln_final(model.residual(new, cache=cache)))
        return {"experts": statistics.mean(hit)} if hit else {}

    def _filled(self, batch: int, context: int) -> Any:
        """Return a cache with the same prompt in every row: it is read once."""
        from workbench.model.cache import KVCache

        cache = KVCache(self._model.cfg, 1, context + STEPS, dtype=self._model.dtype, device=self._model.device)
        self._model.residual(torch.arange(context)[None] % self._model.cfg.d_vocab, cache=cache)
        cache.select(torch.zeros(batch, dtype=torch.long))
        return cache


def bytes_read(cfg: Config, batch: int, context: int, experts: float) -> float:
    """Return the bytes of weights, keys and values that one step reads where `experts` of a layer have slots."""
    heads = (2 * cfg.n_heads + 2 * cfg.n_key_value_heads) * cfg.d_head
    matrices = 2 * cfg.d_model * (heads + cfg.num_experts)
    packed = experts * 3 * cfg.d_model * cfg.d_mlp * 17 / 32
    keys = sum(min(context, window or context) for window in cfg.windows) * 4 * cfg.n_key_value_heads * cfg.d_head
    return cfg.n_layers * (matrices + packed) + 2 * cfg.d_model * cfg.d_vocab + batch * keys


def memory_speed(threads: int) -> float:
    """Return the bytes a second at which torch adds up half a gigabyte of integers, the best of eight times."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    values, best = torch.ones(_SPEED_BYTES // 8, dtype=torch.int64), 0.0
    for _ in range(8):
        start = time.perf_counter()
        values.sum()
        best = max(best, _SPEED_BYTES / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def measure(
    checkpoint: Path, rounds: int, threads: int, contexts: tuple[int, ...] = CONTEXTS, baselines: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return tokens a second of every path at every batch and length, and medians of the ratios of neighbours."""
    from workbench.model.checkpoint import open_checkpoint
    from workbench.model.formats.gguf_writer import write_gguf

    opened = open_checkpoint(checkpoint)
    cfg = opened.cfg
    seconds: dict[tuple[str, int, int], list[float]] = {}
    slower: dict[tuple[str, int, int], list[float]] = {}
    hits: dict[tuple[int, int], float] = {}
    speed = 0.0  # the best of all rounds
    settings = list(product(BATCHES, contexts))
    runs = [
        (path, batch, context)
        for batch, context in settings
        for path in ("plain", *baselines)
        if path != "llama.cpp" or batch == 1
    ]
    total = (rounds + 1) * len(runs) + rounds * len(settings)
    with ExitStack() as stack, progress("bench decode", total, "measurements") as advance:
        sources = {name: checkpoint for name in ("workbench", *baselines)}
        if "llama.cpp" in baselines:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sources["llama.cpp"] = write_gguf(opened, folder / "model.gguf")
        workers = {
            name: stack.enter_context(
                Worker(_module(name) or name, path, threads, {cpu.VARIABLE: "torch" if name == "torch" else "auto"})
            )
            for name, path in sources.items()
        }
        for turn in range(rounds + 1):
            for path, batch, context in runs if turn % 2 else runs[::-1]:
                answer = workers["workbench" if path == "plain" else path].run("decode", batch, context=context)
                if turn:
                    seconds.setdefault((path, batch, context), []).append(answer["seconds"])
                advance(1)
            speed = max(speed, memory_speed(threads))
            for batch, context in settings if turn else ():
                run = partial(_seconds, workers["workbench"], batch, context)
                for path, ratios in overheads(run, HOOKED, PAIRS).items():
                    slower.setdefault((path, batch, context), []).extend(ratios)
                advance(1)
        for batch, context in settings:
            counted = workers["workbench"].run("decode", batch, context=context, path="counted")
            hits[batch, context] = counted["experts"]
    rows = [
        _row(batch, context, seconds, baselines)
        | {path: statistics.median(slower[path, batch, context]) - 1 for path in HOOKED}
        | {
            "bytes": (read := bytes_read(cfg, batch, context, hits[batch, context])),
            "of_memory_speed": read * STEPS / statistics.median(seconds["plain", batch, context]) / speed,
        }
        for batch, context in settings
    ]
    return {
        "threads": threads,
        "rounds": rounds,
        "processor": processor(),
        "torch": torch.__version__,
        "layers": cfg.n_layers,
        "kernels": cpu.description(),
        "memory_bytes_per_s": speed,
        "baselines": list(baselines),
        "measured": time.strftime("%Y-%m-%d"),
        "decode": rows,
    }


def _seconds(worker: Worker, batch: int, context: int, path: str) -> float:
    return worker.run("decode", batch, context=context, path=path)["seconds"]


def _module(baseline: str) -> str | None:
    """Return the module that runs a baseline, of those that are installed."""
    return next((module for module in _BASELINES.get(baseline, ()) if find_spec(module)), None)


def _row(
    batch: int, context: int, seconds: dict[tuple[str, int, int], list[float]], baselines: tuple[str, ...]
) -> dict[str, Any]:
    ours = seconds["plain", batch, context]
    row: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "tokens_per_s": STEPS * batch / statistics.median(ours),
    }
    for name in baselines:
        if theirs := seconds.get((name, batch, context)):
            row[f"{name}_tokens_per_s"] = STEPS * batch / statistics.median(theirs)
            row[f"speed_beside_{name}"] = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return row


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of what `measure` returned."""
    names = result["baselines"]
    columns = ["batch", "context", "tokens/s", "of memory speed", "recorded", "edited", *names]
    rows = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_memory_speed']:.0%}",
            signed(row["recorded"], 1, "%"),
            signed(row["edited"], 1, "%"),
            *(
                f"{row[f'{name}_tokens_per_s']:.1f} ({row[f'speed_beside_{name}']:.2f} ×)"
                if f"{name}_tokens_per_s" in row
                else "–"
                for name in names
            ),
        ]
        for row in result["decode"]
    ]
    return markdown(columns, rows)


def run(checkpoint: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Measure beside every baseline that is installed, and print."""
    available = tuple(name for name in _BASELINES if _module(name))
    result = measure(checkpoint, rounds, threads, baselines=available)
    print(
        f"decoding, {result['layers']} layers, {result['processor']}, {threads} threads, kernels {result['kernels']}; "
        f"memory is read at {result['memory_bytes_per_s'] / 1e9:.0f} GB/s\n\n{table(result)}"
    )
    return result
