"""The commands that typer has registered, in groups of any depth."""

import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import typer

from workbench.cli import app


class Registered(NamedTuple):
    """One command: its name with those of its groups, its function and its parameters as click has them."""

    name: str
    function: Callable[..., Any]
    params: list[Any]

    def hints(self) -> dict[str, Any]:
        """The types of its parameters by their names in Python."""
        return typing.get_type_hints(self.function)


def registered_commands(of: typer.Typer = app) -> Iterator[Registered]:
    """Every command of an app and of the groups in it."""
    yield from _in_group(of, typer.main.get_command(of), "")


def _in_group(group: typer.Typer, built: Any, prefix: str) -> Iterator[Registered]:
    # an app with one command and no group is built as that command
    commands = getattr(built, "commands", None) or {name_of(info): built for info in group.registered_commands}
    for info in group.registered_commands:
        assert info.callback is not None
        yield Registered(f"{prefix}{name_of(info)}", info.callback, commands[name_of(info)].params)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        name = inner.name or inner.typer_instance.info.name
        assert isinstance(name, str)
        yield from _in_group(inner.typer_instance, commands[name], f"{prefix}{name} ")


def name_of(info: Any) -> str:
    """The name of a command, which typer makes from that of its function if none is given."""
    return str(info.name or info.callback.__name__.replace("_", "-"))
