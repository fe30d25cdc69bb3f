"""The gpt-oss workbench: look inside OpenAI's open-weight reasoning models.

Importing this package costs milliseconds: every public name is resolved on first use (PEP 562),
so that reading a run never pays for torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench._links import require_links

if TYPE_CHECKING:
    from workbench import experiments as experiments
    from workbench import figures as figures
    from workbench import harmony as harmony
    from workbench import studies as studies
    from workbench.capture.job import capture as capture
    from workbench.model import load as load
    from workbench.runs import open_run as open_run

    __version__: str

require_links(Path(__file__).parent)

_EXPORTS = {"load": "workbench.model", "open_run": "workbench.runs"}
_ROOMS = ("capture", "harmony", "studies", "figures", "runs", "model", "experiments")  # `capture` is a callable package

__all__ = ["__version__", "capture", "experiments", "figures", "harmony", "load", "open_run", "studies"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("workbench.version").version()
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"workbench.{name}")
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
