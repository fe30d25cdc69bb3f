"""The `study` command's help, which lists the registry, and its options."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.registry import Experiment, Record, records


def describe(record: Record) -> str:
    """Return the help text of a study or experiment, in one paragraph."""
    needs = [f"recorded {needed}" for needed in record.requires]
    needs += ["--model"] if isinstance(record, Experiment) else []
    options = "".join(f" --option {name}=…: {text}" for name, text in record.options.items())
    return f"{record.name}: {record.question}" + (f" Needs {' and '.join(needs)}." if needs else "") + options


class StudyCommand(TyperCommand):
    """A command whose help ends with all studies and experiments; the registry is read only when help is shown."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Add the list."""
        super().format_epilog(ctx, formatter)

    def get_help(self, ctx: Any) -> str:
        """Return the help with the list at its end."""
        self.epilog = "\n\n".join(["Studies and experiments:", *map(describe, records())])
        return super().get_help(ctx)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return NAME=VALUE pairs as keyword arguments; a value is JSON where it can be, else text.

    Raises:
        InputError: a pair has no `=`, or a name appears twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or name in options or name == "seed":
            raise InputError(f"--option {pair!r}: expected NAME=VALUE, each name once, and --seed for the seed")
        try:
            options[name] = parse_json(value)
        except InputError:
            options[name] = value
    return options
