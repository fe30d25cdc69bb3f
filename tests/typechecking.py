"""The check of shapes that `conftest.py` installs."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_calls(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
    """Return a function that checks its arguments and result, except one that is defined within another.

    Such a function is made anew at every call of the outer one: decorating it took a third of the time of a pass of
    the model.
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)
