"""Benchmark the kernels and the whole model on a GPU: correctness first, then speed as a fraction of its limits.

The limits are measured on the card itself, a plain copy and a plain product, so that a fraction means the same on
every card. Nothing is timed before every kernel has agreed with plain torch.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from workbench.bench import table
from workbench.child_processes import python
from workbench.errors import InputError, JobError
from workbench.model.config import PUBLISHED, Config
from workbench.progress import progress

STAGES = ("kernels", "models", "baselines")


class Sizes(NamedTuple):
    """Sizes of the problems: tokens of a prefill, rows of a decode step, cached tokens, and the correctness stage."""

    prefills: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1, 8, 64)
    past: int = 8192
    model_past: int = 1024  # a whole model's cache of 64 × 8,192 tokens would leave no room for the model
    checked: int = 431  # longer than the window, a multiple of nothing
    checked_past: int = 300


SIZES = Sizes()


def run(
    device: str = "cuda",
    configs: Mapping[str, Config] = PUBLISHED,
    sizes: Sizes = SIZES,
    stages: Sequence[str] = STAGES,
    repeats: int = 20,
    assemblers: Sequence[Path] = (),
    tune: bool = False,
    checked: bool = False,
) -> dict[str, Any]:
    """Check the kernels, measure them and print the results; `tune` searches for better tiles, last.

    checked: they have been checked already.

    Raises:
        InputError: a stage is unknown, or an assembler cannot be run.
    """
    if unknown := sorted(set(stages) - set(STAGES)):
        raise InputError(f"stage {unknown[0]!r} is unknown: choose from {', '.join(STAGES)}")
    if missing := [path for path in assemblers if not os.access(path, os.X_OK)]:
        raise InputError(f"assembler {missing[0]} cannot be run: name a ptxas that can be run")
    where = _device(device)
    from workbench.bench import autotune, baselines, models
    from workbench.bench.timing import Clock, limits

    result: dict[str, Any] = {**describe(where), "correct": [] if checked else check(configs, where, sizes)}
    clock = Clock(where, repeats)
    most = limits(clock)
    result["limits"] = most._asdict()
    for name, cfg in configs.items():
        if "kernels" in stages:
            result.setdefault("kernels", []).extend(_kernels(clock, most, name, cfg, sizes))
        if "models" in stages:
            print(f"{name}: the whole model", file=sys.stderr, flush=True)
            rows = models.measure(clock, most, name, cfg, sizes.prefills, sizes.batches, sizes.model_past)
            result.setdefault("models", []).extend(rows)
        if "baselines" in stages:
            rows = baselines.measure(clock, name, cfg, (*sizes.batches, *sizes.prefills))
            result.setdefault("baselines", []).extend(rows)
    if assemblers:
        result["assemblers"] = {str(path): with_assembler(path, repeats) for path in assemblers}
    show(result)
    if tune:
        result["tiles"] = autotune.autotune(
            clock, [c for cfg in configs.values() for c in _problems(cfg, where, sizes)]
        )
    return result


def _problems(cfg: Config, device: torch.device, sizes: Sizes) -> Iterator[Any]:
    """Yield every kernel's cases, decoding once."""
    from workbench.bench.cases import Layer, cases

    layer = Layer(cfg, device)
    for i, tokens in enumerate(sizes.prefills):
        yield from cases(layer, tokens, () if i else sizes.batches, sizes.past)


def _kernels(clock: Any, most: Any, name: str, cfg: Config, sizes: Sizes) -> list[dict[str, Any]]:
    rows = []
    for case in _problems(cfg, clock.device, sizes):
        print(f"{name}: {case.kernel}, {case.problem}", file=sys.stderr, flush=True)
        with torch.no_grad():
            seconds, synchronises = clock(case.launch), clock.synchronises(case.launch)
        row = {"kernel": case.kernel, "model": name, "problem": case.problem, "bytes": case.bytes, "flops": case.flops}
        row |= {"seconds": seconds, "fraction": most.seconds(case.bytes, case.flops) / seconds}
        rows.append(row | {"synchronises": synchronises})
    return rows


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "bench gpu: torch finds no GPU on this machine; run it on a machine with one and a CUDA or ROCm torch"
        )
    if name == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("bench gpu: on a CPU the kernels run interpreted only: set TRITON_INTERPRET=1")
    return torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """Return the card and what runs on it."""
    names = ("torch", "triton")
    about: dict[str, Any] = {"versions": {name: version(name) for name in names}, "python": platform.python_version()}
    if device.type != "cuda":
        return {"card": "none: interpreted on the CPU", **about}
    card = torch.cuda.get_device_properties(device)
    about |= {"memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count}
    return {"card": card.name, "driver": _driver(), "runtime": torch.version.hip or torch.version.cuda, **about}


def _driver() -> str | None:
    """Return the NVIDIA driver's version, where its tool is installed."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def check(configs: Mapping[str, Config], device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare every kernel with plain torch in float64; a JobError names the wrong ones."""
    from workbench.bench.cases import Layer, cases, compare

    rows: list[dict[str, Any]] = []
    for name, cfg in configs.items():
        checked = list(cases(Layer(cfg, device), sizes.checked, sizes.batches, sizes.checked_past))
        with progress(f"correct, {name}", len(checked), "kernels") as advance, torch.no_grad():
            for case in checked:
                error, allowed = compare(case)
                rows.append(
                    {"kernel": case.kernel, "model": name, "problem": case.problem, "error": error, "allowed": allowed}
                )
                advance(1)
    if wrong := [row for row in rows if not row["error"] <= row["allowed"]]:
        differences = "; ".join(
            f"{r['kernel']} ({r['model']}, {r['problem']}): {r['error']:.2g} where {r['allowed']:.2g} is allowed"
            for r in wrong
        )
        raise JobError(f"nothing was timed, as these kernels differ from torch: {differences}")
    return rows


def with_assembler(path: Path, repeats: int) -> list[dict[str, Any]]:
    """Return the kernels' rows when this ptxas assembles them, measured by a process of its own."""
    env = os.environ | {"TRITON_PTXAS_PATH": str(path), "TRITON_PTXAS_BLACKWELL_PATH": str(path)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = python("-m", "workbench.cli", "bench", "gpu", "--stage", "kernels")
        command += ["--repeats", str(repeats), "--json", str(out)]
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise JobError(f"the benchmark with {path} ended with exit code {done.returncode}; its output is above")
        return json.loads(out.read_text())["kernels"]


_TABLES = {
    "kernels": ("kernel", "model", "problem", "seconds", "fraction", "synchronises"),
    "models": ("model", "problem", "seconds", "tokens_per_s", "fraction", "eager_s", "recording", "scaled_from_layers"),
    "baselines": ("baseline", "model", "tokens", "ours_s", "theirs_s", "difference", "missing", "failed"),
}


def show(result: Mapping[str, Any]) -> None:
    """The card and its limits, and a table a stage."""
    most = result["limits"]
    print(
        f"{result['card']}: copies {most['bandwidth'] / 1e12:.3g} TB/s, multiplies {most['flops'] / 1e12:.3g} TFLOP/s; "
        f"{len(result['correct']) or 'all'} kernels agree with torch\n"
    )
    for name, columns in _TABLES.items():
        if name in result:
            rows = [[_cell(column, row.get(column)) for column in columns] for row in result[name]]
            table.show(name, columns, rows)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("fraction", "recording"):
        return f"{value:.1%}"
    if column in ("seconds", "eager_s", "ours_s", "theirs_s"):
        return f"{value * 1e6:,.1f} µs"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
