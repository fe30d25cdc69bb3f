"""The command line as it is typed: the whole way, and one line with the right exit code for each mistake.

Tests `workbench.cli.pipeline` and `workbench.cli.results`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from tests.cli.running import run_command
from tests.conftest import DATA
from workbench import cli, registry
from workbench.errors import JobError
from workbench.figures import paper


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `workbench …`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["workbench", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


@pytest.mark.slow
def test_the_whole_way_from_prompts_to_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if not long:  # figures of all studies are made by the command of the README, whose test runs it
        monkeypatch.setattr(paper, "studies", lambda runs: [registry.find("routing")])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join((DATA / "prompts.jsonl").read_text().splitlines()[::8]) + "\n")
    transcripts, store, out = tmp_path / "t.jsonl", tmp_path / "run.zarr", tmp_path / "out"
    generate = ["generate", "nano", str(prompts), str(transcripts), "--effort", "low", "--effort", "high"]
    assert run(capsys, *generate)[0] == 0
    assert len(transcripts.read_text().splitlines()) == 50
    before = transcripts.read_bytes()
    code, _, err = run(capsys, *generate)  # nothing is missing
    assert (code, transcripts.read_bytes()) == (0, before)
    code, _, err = run(capsys, *generate, "--seed", "1")
    assert code == 2
    assert "was started with seed 0, and this command has 1" in err
    assert run(capsys, "capture", "nano", str(transcripts), str(store))[0] == 0
    code, text, _ = run(capsys, "verify", str(store))
    assert (code, text.splitlines()[0]) == (0, f"{store}: valid")
    code, text, _ = run(capsys, "study", "routing", str(store), "--out", str(out))
    assert code == 0
    assert "analysis against final" in text
    assert (out / "routing.txt").read_text().strip() == text.strip()
    assert list(out.glob("*.csv"))
    code, _, err = run(capsys, "figures", str(store), "--out", str(out), "--format", "html", "--overwrite")
    assert code == 2, "the provenance of a figure may not replace the result of a study"
    assert "was not written by `workbench figures`" in err
    figures = tmp_path / "figures"
    assert run(capsys, "figures", str(store), "--out", str(figures), "--format", "html")[0] == 0
    assert list(figures.glob("*.html"))
    shard = next((store / "routing" / "gates").rglob("c/0/*/*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    code, text, _ = run(capsys, "verify", str(store))
    assert code == 1
    assert "routing/gates" in text
    assert "was changed: its content is not what was written" in text


MISTAKES = {
    "no such model": (["capture", "/no/model", "t.jsonl", "r.zarr"], "neither a folder"),
    "no such transcripts": (["capture", "nano", "/no/t.jsonl", "r.zarr"], "/no/t.jsonl"),
    "no such prompts": (["generate", "nano", "/no/p.jsonl", "t.jsonl"], "/no/p.jsonl"),
    "unknown effort": (["generate", "nano", str(DATA / "prompts.jsonl"), "t.jsonl", "--effort", "max"], "'max'"),
    "unknown record": (["capture", "nano", "TRANSCRIPTS", "r.zarr", "--record", "everything"], "cannot record"),
    "unknown dtype": (["capture", "nano", "TRANSCRIPTS", "r.zarr", "--dtype", "int8"], "choose one of"),
    "unknown device": (["capture", "nano", "TRANSCRIPTS", "r.zarr", "--device", "toaster"], "toaster"),
    "small unit": (["capture", "nano", "TRANSCRIPTS", "r.zarr", "--unit-tokens", "100"], "multiple"),
    "unknown memory": (["info", "20b", "--memory", "plenty"], "80GB or 24GiB"),
    "several devices, one unknown": (
        ["capture", "nano", "TRANSCRIPTS", "r.zarr", "--device", "cpu,toaster"],
        "toaster",
    ),
    "no such run": (["study", "routing", "/no/run.zarr"], "does not exist"),
    "unknown study": (["study", "alchemy", str(DATA / "demo.zarr")], "alchemy"),
    "unknown format": (["figures", str(DATA / "demo.zarr"), "--out", "f", "--format", "bmp"], "bmp"),
    "folder of another program": (["study", "routing", str(DATA)], "not a run"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_exit_2_and_no_file_remains(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "prompt_id": "a", "effort": "low", "tokens": [6, 11], "n_prompt": 1}
    transcripts = tmp_path / "rows.jsonl"
    transcripts.write_text(json.dumps(row) + "\n")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, *[str(transcripts) if a == "TRANSCRIPTS" else a for a in arguments])
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def hidden(command: Any, path: str = "workbench") -> dict[str, str]:
    """Return the help texts of a command that a terminal would not show as they are: rich reads [words] as a style."""
    context = command.context_class(command, info_name=path)
    texts = {path: command.help or "", **{f"{path} {p.name}": p.help or "" for p in command.params}}
    lost = {name: text for name, text in texts.items() if Text.from_markup(text).plain != text}
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        lost |= hidden(command.get_command(context, name), f"{path} {name}")
    return lost


def test_help_shows_each_text_with_its_default() -> None:
    assert hidden(typer.main.get_command(cli.app)) == {}
    broken = typer.Typer()
    broken.command(help="Generate answers [default: all].")(lambda: None)
    assert hidden(typer.main.get_command(broken)) != {}, "negative control: defaults once were in brackets"


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "capture")[0] == 2
    assert run(capsys, "generate", "nano", "a", "b", "--samples", "0")[0] == 2


@pytest.mark.parametrize(
    ("command", "code", "lines"),
    [
        ("summary RUN | true", 0, 0),
        ("verify RUN | true", 0, 0),
        ("verify RUN > /dev/full", 1, 1),
        ("study --help >&-", 0, 0),
        ("LC_ALL=C summary RUN | tail -1", 0, 0),
    ],
)
def test_an_output_that_is_closed_full_or_ascii_is_no_traceback(command: str, code: int, lines: int) -> None:
    words = command.replace("RUN", str(DATA / "demo.zarr"))
    environment, words = (words[:9], words[9:]) if words.startswith("LC_ALL=C ") else ("", words)
    script = f"{environment} PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {sys.executable} -m workbench.cli {words}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False, errors="replace"
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    assert len([line for line in done.stderr.splitlines() if line.startswith("workbench: ")]) == lines


@pytest.mark.parametrize(("module", "command", "extra"), [("panel", ["dashboard", "RUN"], "dashboard")])
def test_a_part_that_is_not_installed_is_named_with_its_extra(
    module: str, command: list[str], extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("workbench.dashboards")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(capsys, *[str(DATA / "demo.zarr") if word == "RUN" else word for word in command])
    assert code == 2
    assert err == f"workbench: {module} is not installed: pip install 'gpt-oss-workbench[{extra}]'\n"


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((DATA.parent / "Makefile").read_text())
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/install_torch.py"):
        (tmp_path / name).write_text("")
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "Python 3.9.1 is too old: Python 3.11 or newer is needed" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_a_run_of_the_first_schema_is_verified() -> None:
    done = run_command("verify", str(DATA / "demo.zarr"))
    assert (done.code, done.out) == (0, f"{DATA / 'demo.zarr'}: valid\n"), done


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_that_wait_sleep_soon_unless_the_user_sets_another_policy(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before torch is imported, which reads it then. The negative control is a choice of the user, which stays."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run(capsys, "--help")
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    code = "import sys; from workbench.cli import main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (MemoryError(), True),
        (ImportError("cannot import name 'x' from 'y'"), False),  # negative control: no other import error is memory
    ],
)
def test_a_library_that_does_not_fit_in_memory_is_named_as_such(
    error: Exception, is_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise error

    monkeypatch.setattr("workbench.cli.app", start)
    with pytest.raises(JobError if is_memory else ImportError) as raised:
        cli._run()
    if is_memory:
        assert str(raised.value).startswith("not enough memory: use smaller numbers, or another machine")
        assert "()" not in str(raised.value)
