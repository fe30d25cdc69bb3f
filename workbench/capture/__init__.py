"""Capture jobs: plan units, run the model over them, write a run. `workbench.capture(...)` runs a job."""

import inspect
import sys
import types
from typing import Any

from workbench.capture.recorder import Recorder as Recorder


class _CallablePackage(types.ModuleType):
    """A package that is also its main function, so that `wb.capture(model, …)` and `wb.capture.plan` both work."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from workbench.capture.job import capture  # late: torch

        return capture(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the signature of the function, for `help`, completion and `inspect.signature`."""
        from workbench.capture.job import capture

        return inspect.signature(capture)


sys.modules[__name__].__class__ = _CallablePackage
