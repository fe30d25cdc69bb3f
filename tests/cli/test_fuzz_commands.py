"""Random command lines end with 0, 1 or 2 and one line, change no input and leave nothing half-written.

`--long` runs thirty times as many cases, and the slow commands too.
"""

import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given

from tests.cli.checks import Checked
from tests.cli.fuzzing import cases
from tests.cli.random_commands import BASES, SLOW, add_traps, command_lines, without_long_work
from tests.cli.registered import registered_commands
from workbench.cli import app
from workbench.errors import InputError

QUICK = 60


def option_names(of: typer.Typer = app) -> dict[str, dict[str, Any]]:
    """Command → name of an option → its type, without None and list."""
    names: dict[str, dict[str, Any]] = {}
    for command in registered_commands(of):
        hints = command.hints()
        options = [(option, param.name) for param in command.params for option in param.opts if option.startswith("-")]
        names[command.name] = {option: plain(hints[name]) for option, name in options}
    return names


def plain(hint: Any) -> Any:
    """The type in `list[int] | None`."""
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return plain(inner[0]) if inner else hint


def test_every_command_is_tested() -> None:
    assert set(option_names()) == set(BASES)
    assert {name.split()[0] for name in option_names()} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_a_command_in_a_group_of_a_group_is_found() -> None:
    """The negative control: one that is in no group is all that the root alone lists."""
    root, outer, inner = typer.Typer(), typer.Typer(), typer.Typer()

    @root.command()
    def first(count: int = 1) -> None: ...

    @inner.command("the-deep-one")
    def deep(names: list[str] | None = None) -> None: ...

    outer.add_typer(inner, name="inner")
    root.add_typer(outer, name="outer")
    assert option_names(root) == {"first": {"--count": int}, "outer inner the-deep-one": {"--names": str}}
    assert len(root.registered_commands) == 1


@pytest.fixture
def checked(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    add_traps(workplace)
    without_long_work(monkeypatch)
    return Checked(workplace)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_random_command_lines(checked: Checked, long: bool) -> None:
    options = option_names()
    commands = [name for name in BASES if long or name not in SLOW]

    @cases(QUICK, long=long)
    @given(command_lines(options, commands))
    def check(words: list[str]) -> None:
        checked.run(*words)

    check()


def test_a_traceback_and_a_changed_input_are_noticed(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: a command with an error of its own, and one that is refused after it wrote."""

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    def writes_and_refuses(file: Path, **_: object) -> None:
        file.write_text("")
        raise InputError("refused")

    monkeypatch.setattr("workbench.harmony.hosts.files.convert", fails)
    with pytest.raises(ZeroDivisionError):
        checked.run("convert", "transcripts.jsonl", "out.jsonl")
    monkeypatch.setattr("workbench.harmony.hosts.files.convert", writes_and_refuses)
    with pytest.raises(AssertionError, match=r"transcripts.jsonl"):
        checked.run("convert", "transcripts.jsonl", "out.jsonl")
