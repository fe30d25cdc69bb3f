"""Experiments: model and run together, to say what each part of a model does, or to change it and see what follows.

`attribution` and `lens` read a pass, `gradients` estimates what patches would do and measures the largest, `effects`
measures interventions, `chain_of_thought` changes the analysis, `registry` has experiments by name, `from_run` brings transcripts and activations from a run.
"""

import importlib
from typing import Any

_MODULES = ("attribution", "registry", "chain_of_thought", "effects", "gradients", "lens", "from_run")

__all__ = ["attribution", "chain_of_thought", "effects", "from_run", "gradients", "lens", "registry"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # late: none pays for torch before it is used
        return importlib.import_module(f"workbench.experiments.{name}")
    raise AttributeError(f"module 'workbench.experiments' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
