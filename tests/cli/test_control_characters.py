"""A text of a run, a file or a host commands no terminal: control characters are shown as escapes."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from tests.cli.running import run_command
from tests.runs.forging import write_hostile_run
from workbench import cli
from workbench.cli.control_characters import visible, visible_controls

# sets the title, writes the clipboard, clears the screen, overwrites the line; 0x9b is a control sequence in 8 bits
HOSTILE = "\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1b[2Jclear\rover\x9b2J\x7f"
COMMANDS = ["summary RUN", "verify RUN", "study effort RUN", "study routing RUN", "conversation RUN 0 --out out.html"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile_run(folder / "run.zarr", HOSTILE)
    return folder


def commands(text: str) -> bool:
    return any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in text)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_commands_no_terminal(
    command: str, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_command(*command.replace("RUN", str(hostile / "run.zarr")).split())
    assert not done.problem()
    assert not commands(done.out + done.err)


def test_errors_and_rows_that_are_left_out_command_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [{"role": HOSTILE, "content": "2+2="}, {"role": "assistant", "content": HOSTILE}]}] * 2
    Path("rows.jsonl").write_text("".join(json.dumps({"id": HOSTILE} | row) + "\n" for row in rows))
    for words in (["convert", "rows.jsonl", "out.jsonl"], ["summary", HOSTILE], ["generate", "nano", HOSTILE, "out"]):
        done = run_command(*words)
        assert not done.problem()
        assert not commands(done.out + done.err), words


def test_a_command_that_prints_what_it_reads_is_noticed(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: standard output as it is."""
    monkeypatch.setattr(cli, "visible_controls", contextlib.nullcontext)
    printed = [run_command(*c.replace("RUN", str(hostile / "run.zarr")).split()).out for c in COMMANDS[:1]]
    assert any(commands(text) for text in printed)


def test_colours_pass_and_progress_bars_move_the_cursor() -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), visible_controls():
        import sys

        print("\x1b[1;31mred\x1b[0m \x1b[2J\r")
        print("\r\x1b[1A\x1b[2K\x1b]0;title\x07", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert out.getvalue() == "\x1b[1;31mred\x1b[0m \\x1b[2J\\x0d\n"
    assert err.getvalue() == "\r\x1b[1A\x1b[2K\\x1b]0;title\\x07\n"
    assert visible("a\tb\n\x1b[1m\r") == "a\tb\n\\x1b[1m\\x0d"
