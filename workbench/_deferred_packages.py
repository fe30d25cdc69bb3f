"""Import of TransformerLens without the libraries that only its model bridge needs.

The workbench uses TransformerLens' hook points, caches and factored matrices, which need torch. The `__init__.py` of
its packages also import transformers, datasets, pandas and pytest, which is half of the time of every start. Here these
packages are created as usual, and their `__init__.py` is executed when a name is read that none of the modules below
defines: `from transformer_lens import TransformerBridge` works as ever.

    defer()
    from transformer_lens import ActivationCache  # imports transformer_lens/ActivationCache.py and what it needs
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# package → name → the module of the package that defines it
_NAMES = {
    "transformer_lens": {name: name for name in ("ActivationCache", "FactoredMatrix", "HookedRootModule")},
    "transformer_lens.utilities": {
        "Slice": "slice",
        "SliceInput": "slice",
        "remove_batch_dim": "tensors",
        "warn_if_mps": "devices",
        "get_act_name": "components_utils",
        "composition_scores": "matrix",
    },
    "transformer_lens.conversion_utils": {},
}
_EXECUTION = threading.RLock()


def defer() -> None:
    """Defer the `__init__.py` of TransformerLens' packages, unless TransformerLens is imported already."""
    if "transformer_lens" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _DeferredPackage(ModuleType):
    """A package whose `__init__.py` has not been executed yet."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a class stands for the module of its own name, as after the `__init__.py`."""
        if isinstance(value, ModuleType) and _NAMES[self.__name__].get(name) == name:
            value = vars(value)[name]
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # inspect and pickle ask every module for such names
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if (module := _NAMES[self.__name__].get(name)) is not None:
            return vars(importlib.import_module(f"{self.__name__}.{module}"))[name]
        self._execute()
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        self._execute()
        return dir(self)

    def _execute(self) -> None:
        """Execute the `__init__.py` once; while it runs, this is an ordinary module."""
        with _EXECUTION:
            if type(self) is not ModuleType:
                self.__class__ = ModuleType  # type: ignore[assignment]
                loader = vars(self)["__spec__"].loader
                loader.original.exec_module(self)


class _DeferringLoader(Loader):
    """Creates a package and leaves its execution to the first access."""

    def __init__(self, original: Loader) -> None:
        self.original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the package as it is."""

    def __getattr__(self, name: str) -> Any:  # get_data, get_source and the like, for importlib.resources and inspect
        return getattr(self.original, name)


class _Finder(MetaPathFinder):
    """Finds the packages above as Python does, and defers them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec
