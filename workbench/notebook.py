"""Whether the program runs in a notebook, where progress is a bar and figures are as wide as the cell."""

import sys
from collections.abc import Callable
from typing import Any


def notebook_display() -> Callable[..., Any] | None:
    """Return the function that shows an object below a notebook's cell; None outside a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    shell = get_ipython()
    return display if shell is not None and getattr(shell, "kernel", None) is not None else None
