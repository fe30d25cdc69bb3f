"""The CPU path beside transformers: the same checkpoint and tokens, turn by turn in one run.

Each model lives in its own process, so that its memory is its own, and waits while another computes. The checkpoint
is random, in gpt-oss-20b's width: two layers, one with a window and one without, and a small vocabulary.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from workbench.bench.decode import CONTEXTS, STEPS, Decoder, steps
from workbench.bench.decode import run as run_decode
from workbench.bench.table import processor
from workbench.bench.worker import Worker, overheads, peak_bytes
from workbench.counting import signed
from workbench.model.config import PUBLISHED
from workbench.model.export import save_random
from workbench.progress import progress

CFG = replace(PUBLISHED["20b"], n_layers=2, windows=(128, None), d_vocab=8192)
Forward = Callable[..., object]


def measure(
    tokens: Sequence[int], rounds: int, threads: int, checkpoint: Path, baselines: Sequence[str]
) -> dict[str, Any]:
    """Measure every model at every length in turn, `rounds` times after one unmeasured pass; medians and ratios."""
    names = ["workbench", *baselines]
    seconds: dict[tuple[str, int], list[float]] = {}
    slower: dict[int, list[float]] = {}
    memory: dict[tuple[str, int], float] = {}
    total = len(tokens) * ((rounds + 1) * len(names) + rounds)
    with ExitStack() as stack, progress("bench cpu", total, "passes") as advance:
        workers = {name: stack.enter_context(Worker(name, checkpoint, threads)) for name in names}
        for n in sorted(tokens):
            for turn in range(rounds + 1):
                for name in names if turn % 2 else names[::-1]:
                    took = _pass(workers[name], n, memory, "plain")
                    if turn:
                        seconds.setdefault((name, n), []).append(took)
                    advance(1)
                if turn:
                    run = partial(_pass, workers["workbench"], n, memory)
                    slower.setdefault(n, []).extend(overheads(run, ("recorded",), _pairs(n))["recorded"])
                    advance(1)
    return {
        "threads": threads,
        "rounds": rounds,
        "processor": processor(),
        "torch": torch.__version__,
        "load_s": {name: worker.load_s for name, worker in workers.items()},
        "lengths": [_compare(n, seconds, slower[n], memory, baselines) for n in sorted(tokens)],
    }


def _pairs(n: int) -> int:
    """Return how many pairs of passes of `n` tokens measure what recording costs, in one round."""
    return max(1, 2560 // n)


def _pass(worker: Worker, n: int, memory: dict[tuple[str, int], float], path: str) -> float:
    """Return the seconds of a pass of `n` tokens, and note its memory."""
    answer = worker.run(path, n)
    memory[worker.name, n] = answer["peak_bytes"]
    return answer["seconds"]


def _compare(
    n: int,
    seconds: dict[tuple[str, int], list[float]],
    slower: list[float],
    memory: dict[tuple[str, int], float],
    baselines: Sequence[str],
) -> dict[str, Any]:
    ours = seconds["workbench", n]
    row: dict[str, Any] = {
        "tokens": n,
        "workbench_s": statistics.median(ours),
        "workbench_bytes": memory["workbench", n],
    }
    row["recording"] = statistics.median(slower) - 1
    for baseline in baselines:
        theirs = seconds[baseline, n]
        row |= {f"{baseline}_s": statistics.median(theirs), f"{baseline}_bytes": memory[baseline, n]}
        row[f"speed_beside_{baseline}"] = statistics.median(_ratios(theirs, ours))
    return row


def _ratios(some: Iterable[float], others: Iterable[float]) -> list[float]:
    """Of passes that ran one after the other, so that a slow minute touches both."""
    return [a / b for a, b in zip(some, others, strict=True)]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def run(
    tokens: Sequence[int] = (512, 2048, 4096),
    rounds: int = 5,
    threads: int | None = None,
    checkpoint: Path | None = None,
    long: int | None = None,
    decode: bool = False,
) -> dict[str, Any]:
    """Measure and print; `checkpoint` is made in a temporary folder unless given.

    `long`: also one pass of this many tokens without logits, recording routing and sinks, in a process of its own.
    `decode`: also tokens a second of generation, by the compiled kernels and by torch.
    """
    threads = threads or len(os.sched_getaffinity(0))
    baselines = [name for name in ("transformers",) if find_spec(name)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint or save_random(Path(scratch) / "two-layers", CFG)
        result = measure(tokens, rounds, threads, folder, baselines) if tokens else {}
        if long:
            with Worker("workbench", folder, threads) as worker:
                result["long"] = {"tokens": long, **worker.run("long", long)}
        if decode:
            result["decoding"] = run_decode(folder, rounds, threads)
    if tokens:
        _print(result, baselines)
    if long:
        took = result["long"]
        print(f"{long:,} tokens, recorded: {took['seconds']:.0f} s, at most {took['peak_bytes'] / 1e9:.1f} GB")
    return result


def _print(result: dict[str, Any], baselines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    loads = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["load_s"].items())
    table = Table(title=f"{result['processor']}, {result['threads']} threads; loading: {loads}")
    for column in (
        "tokens",
        "workbench s",
        "GB",
        "recorded",
        *(c for p in baselines for c in (f"{p} s", "GB", "speed")),
    ):
        table.add_column(column, justify="right")
    for row in result["lengths"]:
        cells = [
            f"{row['tokens']:,}",
            f"{row['workbench_s']:.2f}",
            f"{row['workbench_bytes'] / 1e9:.1f}",
            signed(row["recording"], 1, "%"),
        ]
        for baseline in baselines:
            cells += [
                f"{row[f'{baseline}_s']:.2f}",
                f"{row[f'{baseline}_bytes'] / 1e9:.1f}",
                f"{row[f'speed_beside_{baseline}']:.2f} ×",
            ]
        table.add_row(*cells)
    Console().print(table)


def _workbench(checkpoint: str) -> tuple[float, dict[str, Forward]]:
    from workbench.capture.recording import parse, wanted
    from workbench.hooks.edits import applied
    from workbench.hooks.experts import forbid
    from workbench.hooks.recorders import Recorder
    from workbench.model import load

    start = time.perf_counter()
    model = load(checkpoint, device="cpu")
    load_s = time.perf_counter() - start
    recorder = Recorder(wanted(parse(["routing", "sinks"], model.cfg), model.cfg))

    @contextmanager
    def recording() -> Iterator[None]:
        with model.hooks(fwd_hooks=recorder.fwd_hooks):
            yield
        recorder.take()

    without_two = [forbid(layer, [0, 1]) for layer in range(model.cfg.n_layers)]
    decoder = Decoder(
        model, {"plain": nullcontext, "recorded": recording, "edited": lambda: applied(model, *without_two)}
    )

    def recorded(tokens: torch.Tensor) -> None:
        model.run_with_hooks(tokens, fwd_hooks=recorder.fwd_hooks)
        recorder.take()

    def long(tokens: torch.Tensor) -> None:
        """Without the logits, which would take as much memory as another model."""
        with model.hooks(fwd_hooks=recorder.fwd_hooks):
            model.residual(tokens)
        recorder.take()

    return load_s, {"plain": model, "recorded": recorded, "long": long, "decode": decoder}


def _transformers(checkpoint: str) -> tuple[float, dict[str, Forward]]:
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    load_s = time.perf_counter() - start
    caches: dict[tuple[int, int], Any] = {}

    def decode(tokens: torch.Tensor, context: int) -> None:
        """The context grows by a few tokens with every call: a cache with windows cannot be cut back."""
        key = tokens.shape[1], context
        if key not in caches:
            prompt = torch.arange(context)[None] % model.config.vocab_size
            caches[key] = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            caches[key].batch_repeat_interleave(tokens.shape[1])  # its attention to eight prompts takes 17 GB
        for new in steps(tokens, model.config.vocab_size):
            model(new, past_key_values=caches[key])

    return load_s, {"plain": model, "decode": decode}


def _llama_cpp(path: str) -> tuple[float, dict[str, Forward]]:
    from llama_cpp import Llama

    threads = int(os.environ["OMP_NUM_THREADS"])
    start = time.perf_counter()
    model = Llama(path, n_ctx=CONTEXTS[-1] + 1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    load_s = time.perf_counter() - start
    length = 0

    def decode(tokens: torch.Tensor, context: int) -> None:
        nonlocal length
        if length != context:
            model.reset()
            model.eval([n % CFG.d_vocab for n in range(context)])
            length = context
        for new in steps(tokens, CFG.d_vocab):
            model.eval(new[:, 0].tolist())

    return load_s, {"decode": decode}


def _xllamacpp(path: str) -> tuple[float, dict[str, Forward]]:
    from xllamacpp import CommonParams, Server

    threads = int(os.environ["OMP_NUM_THREADS"])
    params = CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = path, CONTEXTS[-1] + 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    start = time.perf_counter()
    server = Server(params)
    load_s = time.perf_counter() - start

    def decode(tokens: torch.Tensor, context: int) -> dict[str, float]:
        """Return the time of the steps after the prompt, as the server measures it."""
        prompt = [n % CFG.d_vocab for n in range(context)]
        request = {"prompt": prompt, "n_predict": STEPS + 1, "ignore_eos": True, "temperature": 0.0}
        timings = server.handle_completions(request)["timings"]
        assert timings["predicted_n"] == STEPS + 1, timings  # the prompt gives the first of them
        return {"seconds": timings["predicted_ms"] / 1000}

    return load_s, {"decode": decode}


_MODELS = {
    "workbench": _workbench,
    "transformers": _transformers,
    "llama_cpp": _llama_cpp,
    "xllamacpp": _xllamacpp,
}


def _work(name: str, checkpoint: str) -> None:
    """A worker's life: load, then a pass for every line of standard input."""
    load_s, forwards = _MODELS[name](checkpoint)
    print(json.dumps({"load_s": load_s}), flush=True)
    for line in sys.stdin:
        path, n, options = json.loads(line)
        tokens = torch.randint(CFG.d_vocab, (1, n), generator=torch.Generator().manual_seed(n))
        start = time.perf_counter()
        with torch.no_grad():
            answer = forwards[path](tokens, **options)
        seconds = time.perf_counter() - start
        more = answer if type(answer) is dict else {}
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **more}), flush=True)


if __name__ == "__main__":
    _work(*sys.argv[1:])
