"""Ctrl-C while the command line is loaded."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.child_processes import python
from workbench.cli.starting import interrupted_in_one_line

INTERRUPTING = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"  # a module that stops what imports it


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with a typer that interrupts it as soon as it is imported."""
    (folder / "typer.py").write_text(INTERRUPTING)
    command = python(*arguments)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_before_the_command_began_is_one_line(tmp_path: Path) -> None:
    ended = started(tmp_path, "-m", "workbench.cli", "info", "nano")
    assert ended.returncode == 130
    assert ended.stderr == "workbench: interrupted before the command began; nothing was written\n"
    other = started(tmp_path, "-c", "import workbench.cli")  # negative control: a program that imports it
    assert "Traceback" in other.stderr


def test_another_program_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(KeyboardInterrupt), interrupted_in_one_line():
        signal.raise_signal(signal.SIGINT)
