"""Every option of every command that names an output follows the one rule of `workbench.outputs`.

Also tests `workbench.cli.finetuning`.
"""

import os
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.registered import registered_commands
from tests.cli.running import run_command, snapshot
from workbench.cli import sharing

# what each output's command is called with; OUT is the output. Benchmarks are refused before they measure anything.
OUTPUTS: dict[tuple[str, str], str] = {
    ("convert-weights", "out"): "nano OUT",
    ("random", "out"): "OUT",
    ("generate", "out"): "nano prompts.jsonl OUT --max-new-tokens 1",
    ("transcripts", "out"): "http://127.0.0.1:9/v1 prompts.jsonl OUT --model m --retries 0",
    ("convert", "out"): "transcripts.jsonl OUT",
    ("capture", "run"): "nano transcripts.jsonl OUT --unit-tokens 1024",
    ("capture", "log"): "nano transcripts.jsonl new.zarr --unit-tokens 1024 --log OUT",
    ("export", "out"): "run.zarr OUT --format parquet",
    ("study", "out"): "routing run.zarr --out OUT",
    ("report", "out"): "run.zarr --out OUT",
    ("figures", "out"): "run.zarr --format html --out OUT",
    ("finetune", "out"): "nano transcripts.jsonl --out OUT --steps 1 --batch 1 --rank 1",
    ("graph", "out"): "nano --prompt 2+2= --out OUT --max-new-tokens 4",
    ("graph-ablation", "out"): "graph.json --model nano --out OUT --top 1",
    ("feature-ablation", "out"): "run.zarr 3 --model nano --sae sae --examples 1 --out OUT",
    ("apply", "out"): "recipe.json --prompts prompts.jsonl --controls 20 --out OUT",
    ("apply", "answers"): "recipe.json --answers OUT",
    ("attention", "out"): "run.zarr 0 --model nano --out OUT",
    ("conversation", "out"): "run.zarr 0 --out OUT",
    ("publish", "out"): "run.zarr --out OUT",
    ("bench cpu", "out"): "bench cpu --json OUT",
    ("bench full", "out"): "bench full --json OUT",
    ("bench capture", "out"): "bench capture --json OUT",
    ("bench store", "out"): "bench store --json OUT",
    ("bench reading", "out"): "bench reading run.zarr --json OUT",
    ("bench studies", "out"): "bench studies run.zarr --json OUT",
    ("bench dashboard", "out"): "bench dashboard run.zarr --json OUT",
    ("bench kernels", "out"): "bench kernels --json OUT",
    ("bench graph", "out"): "bench graph nano --json OUT",
    ("bench gpu", "out"): "bench gpu --json OUT",
    ("bench gpu", "autotune"): "bench gpu --autotune OUT",
}
INPUTS = {
    "recipe",
    "recipes",  # a folder; `tests/live/test_recipe_folder.py` tests what viewers may write in it
    "prompts",
    "transcripts",
    "file",
    "graph",
    "requests",
    "adapter",
    "results",
    "sae",
    "basic_auth",
    "checkpoint",
    "assembler",
    "data",
}
# outputs that are text, as they may be a URL; one run of random numbers is made where there is none
TEXT_OUTPUTS = {("capture", "run"), ("bench reading", "run")}
FOLDERS_OF_FILES = {("study", "out"), ("figures", "out"), ("apply", "out"), ("feature-ablation", "out")}


def arguments(output: tuple[str, str], out: str) -> list[str]:
    words = [out if word == "OUT" else word for word in OUTPUTS[output].split()]
    words = [word.replace(".gguf", "") if word == out else word for word in words]
    return words if output[0].startswith("bench") else [output[0], *words]


def path_options() -> Iterator[tuple[str, str]]:
    """Command and name of every argument and option that is a path."""
    for command in registered_commands():
        for name, hint in command.hints().items():
            if Path in (hint, *typing.get_args(hint)) or hint == list[Path] | None:
                yield command.name, name


def test_every_path_is_known_as_an_input_or_an_output() -> None:
    unknown = {(command, name) for command, name in path_options() if name not in INPUTS} - set(OUTPUTS)
    assert not unknown
    assert set(OUTPUTS) - set(path_options()) <= TEXT_OUTPUTS


def refused(output: tuple[str, str], out: str, folder: Path, *more: str) -> str:
    """The error of a command that has to be refused and to change nothing."""
    before = snapshot(folder)
    done = run_command(*arguments(output, out), *more)
    assert (done.code, done.problem()) == (2, ""), done
    assert snapshot(folder) == before
    return done.err


def name_of(output: tuple[str, str], name: str) -> str:
    return f"{name}.gguf" if output[0] == "convert-weights" else name


@pytest.mark.parametrize("output", OUTPUTS, ids=" ".join)
def test_what_somebody_else_wrote_is_kept(output: tuple[str, str], workplace: Path) -> None:
    out = workplace / name_of(output, "precious")
    if output in FOLDERS_OF_FILES:
        out.write_text("mine")
        assert "is not a folder" in refused(output, out.name, workplace)
        return
    out.write_text("mine")
    overwrite = () if output[1] == "log" else ("--overwrite",)
    for more in {(), overwrite}:
        assert "precious" in refused(output, out.name, workplace, *more)


@pytest.mark.parametrize("output", OUTPUTS, ids=" ".join)
def test_devices_pipes_and_links_are_no_outputs(output: tuple[str, str], workplace: Path) -> None:
    pipe, link = (workplace / name_of(output, name) for name in ("pipe", "link"))
    os.mkfifo(pipe)
    (workplace / "target").write_text("mine")
    link.symlink_to(workplace / "target")
    refusals = [refused(output, path.name, workplace) for path in (pipe, link)]
    if output[0] != "convert-weights":
        refusals.append(refused(output, "/dev/full", workplace))
    assert all("workbench: " in line for line in refusals)


def inputs_of(output: tuple[str, str]) -> list[str]:
    """The inputs of a command that lie in the current folder, which may not be replaced."""
    if output[0].startswith("bench") or output == ("convert-weights", "out"):  # its output has an ending of its own
        return []
    return [word for word in OUTPUTS[output].split() if word in ("run.zarr", "transcripts.jsonl", "prompts.jsonl")]


@pytest.mark.parametrize("output", [output for output in OUTPUTS if inputs_of(output)], ids=" ".join)
def test_an_input_is_no_output(output: tuple[str, str], workplace: Path) -> None:
    """The file or run that the command reads, and a file inside that run."""
    for name in inputs_of(output):
        inner = f"{name}/new" if name == "run.zarr" else name
        error = refused(output, inner, workplace, *(() if output[1] == "log" else ("--overwrite",)))
        assert "workbench: " in error


@pytest.mark.parametrize("output", [("conversation", "out"), ("study", "out"), ("export", "out"), ("convert", "out")])
def test_the_same_command_replaces_what_it_wrote(output: tuple[str, str], workplace: Path) -> None:
    assert run_command(*arguments(output, "out")).code == 0
    refused(output, "out", workplace)
    before = {name for name in snapshot(workplace) if not name.startswith("run.zarr")}
    assert run_command(*arguments(output, "out"), "--overwrite").code == 0
    assert {name for name in snapshot(workplace) if not name.startswith("run.zarr")} == before


def test_a_command_that_writes_by_itself_is_noticed(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a page that is written without asking."""
    monkeypatch.setattr("workbench.outputs.check_output", lambda out, **options: Path(out))
    with pytest.raises(AssertionError):
        test_what_somebody_else_wrote_is_kept(("conversation", "out"), workplace)
    assert sharing.app.registered_commands
