"""A process that starts commands and kills them: `python -m tests.capture.killing FOLDER SEED SIGNAL KIND=KILLS …`.

KIND: "capture", "workers" (capture by two processes), "s3" (capture into `s3://runs`), "generate", "transcripts",
"finetune", or "branching" (the study sentence-importance with its stored continuations). FOLDER/KIND holds
prompts.jsonl, transcripts.jsonl or run.zarr. SIGNAL: "KILL", "INT", or "both" in turn. Children are forked off a
process that has imported everything, so a kill costs a fraction of a second and falls anywhere between the first file
and the last. An output that gets to its end is left for the test, and the next begins. Prints as JSON how many kills
and outputs of each kind there were, or why it failed.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

import workbench as wb
from tests.capture.mock_host import serving
from workbench import cli
from workbench.adapters import finetune
from workbench.capture import compute, generation, job, pipeline  # noqa: F401  loaded before the first fork
from workbench.experiments import sentence_importance  # noqa: F401
from workbench.harmony.hosts import collect  # noqa: F401

RECORD = ["routing", "sinks", "logprobs", "resid_post:1,3", "mlp_out:2 channel=final"]
CAPTURE = ["--unit-tokens", "1024", "--dtype", "float32", *(f"--record={name}" for name in RECORD)]
ENDS = {"generate": ".jsonl", "transcripts": ".jsonl"}
TRAINING = ["--steps", "4", "--batch", "2", "--rank", "1", "--part", "attention", "--dtype", "float32"]
BRANCHING = [
    "--dtype",
    "float32",
    "--sequences",
    "2",
    "--option",
    "conversations=2",
    "--option",
    "samples=10",
    "--option",
    "rounds=1",
]
BRANCHING += ["--option", "max_sentences=3", "--option", "max_new_tokens=12", "--overwrite"]
# of a command that SIGINT stopped before, while or after it was at work
STOPPED = (1, 130, -signal.SIGINT)


def arguments(kind: str, folder: Path, number: int, url: str) -> list[str]:
    """The command that makes output `number`."""
    prompts, transcripts, out = (
        folder / "prompts.jsonl",
        folder / "transcripts.jsonl",
        f"{kind}-{number}{ENDS.get(kind, '')}",
    )
    if kind == "generate":
        return [
            "generate",
            "nano",
            str(prompts),
            str(folder / out),
            "--batch",
            "2",
            "--dtype",
            "float32",
            "--max-new-tokens",
            "24",
        ]
    if kind == "transcripts":
        return ["transcripts", url, str(prompts), str(folder / out), "--model", "m", "--api", "chat", "--retries", "1"]
    if kind == "finetune":
        return ["finetune", "nano", str(transcripts), "--out", str(folder / out), *TRAINING]
    if kind == "branching":
        where = ["--out", str(folder / out), "--option", f"store={folder / out}.jsonl"]
        return ["study", "sentence-importance", str(folder / "run.zarr"), "--model", "nano", *where, *BRANCHING]
    target = f"s3://runs/{out}" if kind == "s3" else str(folder / out)
    return ["capture", "nano", str(transcripts), target, *CAPTURE, *(["--workers", "2"] if kind == "workers" else [])]


def main(folder: Path, seed: int, signals: list[signal.Signals], kinds: dict[str, int]) -> None:
    torch.set_num_threads(1)  # what is forked has no other threads
    wb.load("nano", dtype=torch.float32)
    finetune._SAVE_S = 0.0  # after every step, not every two minutes
    results: dict[str, tuple[int, int] | str] = {}
    for kind, kills in kinds.items():
        try:
            results[kind] = _kill_often(kind, folder / kind, kills, np.random.default_rng(seed), signals)
        except SystemExit as failed:
            results[kind] = str(failed)
    print(json.dumps(results))


def _kill_often(
    kind: str, folder: Path, kills: int, rng: np.random.Generator, signals: list[signal.Signals]
) -> tuple[int, int]:
    """Kill commands of a kind; return the numbers of kills and of outputs that came to their end."""
    killed = outputs = 0
    longest, resumes = 0.0, False
    with serving() if kind == "transcripts" else contextlib.nullcontext("") as url:
        while killed < kills:
            begun = time.monotonic()
            child = _started(arguments(kind, folder, outputs, url), folder / "stderr")
            wait = rng.uniform(0, longest) if longest else 600.0
            status = _ends_within(child, wait)
            if status is None:
                _kill(child, signals[killed % len(signals)])
                killed += 1
            elif status == 0:
                longest, outputs = max(longest, time.monotonic() - begun), outputs + 1
            elif resumes and "exists: choose another name" in (folder / "stderr").read_text():
                outputs += 1  # killed when all was written
            else:
                raise SystemExit(f"{kind} failed by itself: status {status}: {(folder / 'stderr').read_text()[-500:]}")
            resumes = status is None
            if "Traceback" in (text := (folder / "stderr").read_text()):
                raise SystemExit(f"{kind}: a traceback: {text[-1500:]}")
    return killed, outputs


def _started(words: list[str], errors: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()  # workers belong to the command, and are killed with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    sys.argv = ["workbench", *words]
    code = 3
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def _kill(child: int, number: int) -> None:
    """Kill a command and its workers, or ask it to stop and check how it ends."""
    if number == signal.SIGKILL:
        os.killpg(child, number) if os.getpgid(child) == child else os.kill(child, number)
        os.waitpid(child, 0)
        return
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, *STOPPED):
        raise SystemExit(f"stopped by a signal with status {code}")


def _ends_within(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


if __name__ == "__main__":
    names = ("KILL", "INT") if sys.argv[3] == "both" else (sys.argv[3],)
    wanted = {kind: int(kills) for kind, kills in (word.split("=") for word in sys.argv[4:])}
    main(Path(sys.argv[1]), int(sys.argv[2]), [signal.Signals[f"SIG{n}"] for n in names], wanted)
