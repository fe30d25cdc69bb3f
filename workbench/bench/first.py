"""The first checks on a new GPU: correctness before timings, each step in a process of its own.

Steps that check run side by side, as most of their time is spent compiling and on references on the CPU. A step that
crashes, hangs or fails is recorded, and the other steps run. Timings run alone, and only where every other step passed.
The result is one JSON file and a short Markdown table of it, to be read and sent back.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from workbench.bench import table
from workbench.child_processes import python
from workbench.errors import InputError
from workbench.outputs import MARKER, check_files, write_files

_MODULE = "workbench.bench.first_steps"
_ERROR_CHARACTERS = 2000
_AT_ONCE = max(1, min(6, (os.cpu_count() or 1) // 2))  # steps that check


class Step(NamedTuple):
    """One step: a function ("module:name") that takes a device and returns numbers, or raises where they are wrong.

    Names are unique.
    """

    name: str
    purpose: str
    function: str
    limit_s: float
    timing: bool = False  # runs alone, and only where every other step passed


STEPS = (
    Step("versions", "GPUs, driver, torch, and the Triton that torch requires", f"{_MODULE}:versions", 60),
    Step("nano", "nano on the GPU against the CPU: logits, generation, gradients", f"{_MODULE}:nano", 180),
    Step("variants", "nano packed, in two rows, after a cache and hooked; quantisation", f"{_MODULE}:variants", 120),
    Step(
        "synchronisation", "a prefill and a decode step that never wait for the GPU", f"{_MODULE}:synchronisation", 90
    ),
    Step("capture", "the same records with blocking launches, on cuda:1 and on two GPUs", f"{_MODULE}:capture", 240),
    Step("kernels", "every kernel against float64, also with 24 and 128 experts", f"{_MODULE}:kernels", 300),
    Step(
        "experiments",
        "six experiments with nano against the CPU",
        "workbench.bench.first_experiments:experiments",
        240,
    ),
    Step("sanitizer", "compute-sanitizer on a small forward and backward pass", f"{_MODULE}:sanitizer", 240),
    Step("profile", "the kernels of two layers of gpt-oss-20b, in one decode step", f"{_MODULE}:profile", 120),
    Step("memory", "weights and a pass of gpt-oss-120b's layers against the plan", f"{_MODULE}:memory", 180),
    Step("graphs", "decode steps of nano as CUDA graphs: the same tokens", f"{_MODULE}:graphs", 120),
    Step("timings", "kernels and models as fractions of the card's limits", f"{_MODULE}:timings", 600, timing=True),
)


def run(device: str, out: Path, steps: Sequence[Step] = STEPS, *, overwrite: bool = False) -> dict[str, Any]:
    """Run the steps, timings last, and write `out` (JSON) and its Markdown whenever one has ended.

    Raises:
        InputError: the files may not be written, see `workbench.outputs`.
    """
    page, marker = out.with_suffix(".md"), f".{out.stem}{MARKER}"
    check_files([out.name, page.name], out.parent, command="bench", overwrite=overwrite, marker=marker)
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows: dict[str, dict[str, Any]] = {}

    def ended(step: Step, row: dict[str, Any]) -> dict[str, Any]:
        """Write what has ended so far, in the order of the steps."""
        print(f"{step.name}: {row['status']} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)
        again = overwrite or bool(rows)
        rows[step.name] = {"name": step.name, "purpose": step.purpose, "limit_s": step.limit_s, **row}
        listed = [rows[s.name] for s in steps if s.name in rows]
        result: dict[str, Any] = {"started": begun, "device": device, "steps": listed}
        files = {out.name: json.dumps(result, indent=1) + "\n", page.name: markdown(result)}
        write_files(files, out.parent, command="bench", overwrite=again, marker=marker)
        return result

    checks = [step for step in steps if not step.timing]
    print(f"checking: {', '.join(step.name for step in checks)}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {pool.submit(_child, step, device): step for step in checks}
        for future in as_completed(running):
            result = ended(running[future], future.result())
    failed = [row["name"] for row in rows.values() if row["status"] in ("failed", "timeout")]
    listed = ", ".join(sorted(failed, key=[step.name for step in steps].index))
    skipped = {"status": "skipped", "seconds": 0.0, "error": f"not timed, as these steps failed: {listed}"}
    for step in steps:
        if step.timing:
            result = ended(step, skipped if failed else _child(step, device))
    return result


def _child(step: Step, device: str) -> dict[str, Any]:
    """Run one step in a process of its own: its status, seconds, and result or error."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        command = python("-m", _MODULE, step.function, device, str(answer))
        # A group of its own, so that what a step has started ends with it.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            _, stderr = process.communicate(timeout=step.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            seconds = time.monotonic() - begun
            return {"status": "timeout", "seconds": seconds, "error": f"stopped after {step.limit_s:g} s"}
        seconds = time.monotonic() - begun
        if process.returncode == 0 and answer.exists():
            return {"seconds": seconds, **json.loads(answer.read_text())}
    error = stderr.decode(errors="replace").strip()[-_ERROR_CHARACTERS:]
    return {"status": "failed", "seconds": seconds, "error": f"exit code {process.returncode}: {error}"}


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a table, and under it each step's numbers or error in short."""
    lines = [f"# First run on {result['device']}, {result['started']}", "", "| step | status | seconds | checks |"]
    lines += ["|---|---|---|---|"]
    for row in result["steps"]:
        lines.append(f"| {row['name']} | {row['status']} | {row['seconds']:.1f} | {row['purpose']} |")
    for row in result["steps"]:
        text = row.get("error") or json.dumps(row.get("result"), indent=1)
        lines += [
            "",
            f"## {row['name']}: {row['status']}",
            "",
            "```",
            text[:_ERROR_CHARACTERS].replace("```", "'''"),
            "```",
        ]
    return "\n".join(lines) + "\n"


def show_steps(steps: Sequence[Step] = STEPS) -> None:
    """Print the steps without running them."""
    rows = [[step.name, step.purpose, f"{step.limit_s:.0f} s"] for step in steps]
    table.show("The first run on a GPU", ("step", "checks", "at most"), rows)


def start(device: str, out: Path | None, *, dry_run: bool, overwrite: bool = False) -> int:
    """Run `workbench bench gpu --first`; return 1 where a step failed.

    Raises:
        InputError: torch sees no GPU, or the files may not be written.
    """
    if dry_run:
        show_steps()
        return 0
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "bench gpu --first: torch finds no GPU on this machine; `--dry-run` lists the steps without one"
        )
    path = out or Path("gpu-first.json")
    result = run(device, path, overwrite=overwrite)
    rows = [[row["name"], row["status"], f"{row['seconds']:.1f} s"] for row in result["steps"]]
    table.show("The first run on a GPU", ("step", "status", "time"), rows)
    print(f"written: {path} and {path.with_suffix('.md')}")
    return int(any(row["status"] in ("failed", "timeout") for row in result["steps"]))
