"""Random command lines, made of every command as it succeeds, and a folder in which they run."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.cli.hostile_values import HOSTILE_TEXT, NUMBERS, REPEATS
from workbench.errors import JobError
from workbench.registry import Experiment, records
from workbench.research.recipe import Recipe

# every command as it succeeds; numbers keep it short. A benchmark measures nothing, see `without_long_work`
BASES: dict[str, str] = {
    "info": "nano",
    "convert-weights": "nano out.gguf",
    "random": "out --layers 1 --vocab 100",
    "generate": "nano prompts.jsonl out.jsonl --max-new-tokens 1 --effort low",
    "transcripts": "http://127.0.0.1:9/v1 prompts.jsonl out.jsonl --model m --retries 0 --timeout 2",
    "convert": "transcripts.jsonl out.jsonl",
    "capture": "nano transcripts.jsonl out.zarr --unit-tokens 1024",
    "verify": "run.zarr",
    "export": "run.zarr out --format parquet",
    "study": "effort run.zarr",
    "summary": "run.zarr",
    "report": "run.zarr --out out.html",
    "figures": "run.zarr --format html --out out",
    "dashboard": "run.zarr --port 45006",
    "finetune": "nano transcripts.jsonl --out out --steps 1 --batch 1 --rank 1",
    "graph": "nano --prompt 2+2= --out out.json --max-new-tokens 2 --at 0",
    "graph-ablation": "graph.json --model nano --out out.json --top 1",
    "feature-ablation": "run.zarr 3 --model nano --sae sae --examples 1",
    "attention": "run.zarr 0 --model nano --out out.npz",
    "conversation": "run.zarr 0 --out out.html",
    "publish": "run.zarr --out out --conversations 0",
    "live": "nano --port 45007",
    "apply": "recipe.json --python",
    "label": "run.zarr",
    "bench cpu": "--json out.json",
    "bench full": "--json out.json",
    "bench capture": "--json out.json",
    "bench store": "--json out.json",
    "bench reading": "run.zarr --json out.json",
    "bench studies": "run.zarr --json out.json",
    "bench dashboard": "run.zarr --json out.json",
    "bench kernels": "--json out.json",
    "bench gpu": "--json out.json",
    "bench graph": "nano --json out.json",
}
SLOW = {"report", "figures", "finetune", "graph", "study", "publish", "label"}


@st.composite
def command_lines(draw: st.DrawFn, options: dict[str, dict[str, Any]], commands: list[str]) -> list[str]:
    """Return a command with one to three of its words missing, changed or added; options: command → name → type."""
    command = draw(st.sampled_from(commands))
    words = BASES[command].split()
    if command == "study":
        record = draw(st.sampled_from(records()))
        words = [record.name, "run.zarr", *(["--model", "nano"] if isinstance(record, Experiment) else [])]
        if record.options and draw(st.booleans()):
            words += ["--option", f"{draw(st.sampled_from(sorted(record.options)))}={draw(HOSTILE_TEXT)}"]
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(["option", "option", "replace", "replace", "drop", "add", "flag"]))
        if change == "option":
            name = draw(st.sampled_from(sorted(options[command])))
            kind = options[command][name]
            words.append(name)
            if kind is not bool:
                numbers = REPEATS if name in ("--samples", "--retries") else NUMBERS
                words.append(draw(numbers if kind in (int, float) else HOSTILE_TEXT))
        elif change == "flag":
            words.append(draw(st.sampled_from(sorted(options[command]))))
        elif change == "add":
            words.append(draw(HOSTILE_TEXT))
        elif words:
            place = draw(st.integers(0, len(words) - 1))
            words[place : place + 1] = [draw(HOSTILE_TEXT)] if change == "replace" else []
    return [*command.split(), *words]


def add_traps(folder: Path) -> None:
    """Put what is not an input and no output of a command beside its inputs."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "transcripts.jsonl")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "recipe.json").write_text(Recipe(user="2+2=", max_new_tokens=2).to_json())
    (folder / "folder").mkdir()
    (folder / "folder" / "mine").write_text("precious")
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)


def without_long_work(patch: pytest.MonkeyPatch) -> None:
    """Replace what serves, measures, or starts processes: a command gets as far as that, and ends."""

    def ends(*_: object, **__: object) -> Any:
        raise JobError("the test ends here")

    def random_weights(path: Path, *_: object, **__: object) -> None:
        path.mkdir()
        (path / "config.json").write_text("{}")

    from workbench.bench import capture, cpu, dashboard, first, full, gpu, graph, kernels, reading, store, studies
    from workbench.capture import cluster
    from workbench.dashboards import app
    from workbench.model import export

    patch.setattr(app.pn, "serve", ends)
    patch.setattr(app, "_warm", lambda registry: None)
    patch.setattr(cluster, "run", ends)
    patch.setattr(export, "save_random", random_weights)
    for module in (capture, cpu, full, graph, store):
        patch.setattr(module, "run", lambda *_, **__: {})
    patch.setattr(gpu, "run", lambda **_: {"tiles": {}})
    patch.setattr(kernels, "run", lambda *_, **__: ([], []))
    patch.setattr(dashboard, "run", lambda *_: {})
    patch.setattr(studies, "measure", lambda *_: {})
    patch.setattr(reading, "ask", lambda *_: {})
    patch.setattr(reading, "make", lambda *_: None)
    patch.setattr(first, "start", lambda *_, **__: 0)
    patch.setattr("workbench.inputs.WRITER_TIMEOUT_S", 0.05)
    patch.setattr("workbench.harmony.hosts.client._LONGEST_WAIT_S", 0.01)  # between retries
