"""The hooked transformer and everything it needs: config, checkpoint, rope, cache, generation."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.model.loading import load as load
    from workbench.model.transformer import GptOss as GptOss

__all__ = ["GptOss", "load"]

_HOMES = {"load": "workbench.model.loading", "GptOss": "workbench.model.transformer"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # late: reading a config does not pay for transformer_lens
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'workbench.model' has no attribute {name!r}")
