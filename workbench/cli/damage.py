"""Damaged runs as the cause of an error: a command states what it could not read, instead of a traceback.

Metadata that was changed can make a reader fail anywhere. If a command fails with an error of the workbench, its runs
are verified; one that is damaged is named with its first problem. Otherwise the error is the workbench's own.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer

from workbench.errors import InputError, JobError

_RUNS = ("run", "runs", "other")  # names of the arguments that are runs
_Command = TypeVar("_Command", bound=Callable[..., Any])


def names_damage(command: _Command) -> _Command:
    """Return the command such that an error that comes from a damaged run is a `DamageError` that names the damage."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (InputError, JobError, OSError, typer.Exit, typer.Abort, ImportError, MemoryError):
            raise
        except Exception as error:
            _raise_damage(signature.bind(*args, **options).arguments, error)
            raise

    return wrapped  # type: ignore[return-value]


def _raise_damage(arguments: dict[str, Any], error: Exception) -> None:
    """Verify the runs among the arguments.

    Raises:
        DamageError: one of them is damaged.
    """
    from workbench.runs.manifest import DamageError
    from workbench.runs.verify import verify

    for path in filter(_exists, _runs(arguments)):
        for problem in verify(path)[:1]:
            what = problem.what if problem.where == path else f"{problem.where}: {problem.what}"
            raise DamageError(path, what) from error


def _exists(path: str) -> bool:
    """Return whether there is a run, which a capture has not written before it failed."""
    from workbench.runs.storage import storage_at

    return storage_at(path).exists()


def _runs(arguments: dict[str, Any]) -> Iterator[str]:
    for name in _RUNS:
        given = arguments.get(name)
        yield from given if isinstance(given, list) else [given] if given else []
