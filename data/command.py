"""Run a script's `main`: an error that the user can fix is one line on standard error and exit code 2."""

import sys
from collections.abc import Callable

import typer

from workbench.errors import InputError


def run(main: Callable[..., None]) -> None:
    """Call `main` with the arguments of the command line."""
    try:
        typer.run(main)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
