"""Loops in numba's cache on disk are compiled again when any source beside them has changed."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("numba")
import numpy as np
from numba import types

from workbench.kernels.cpu import compilation

HELPER = "from numba import njit\n\n@njit\ndef amount():\n    return {amount}\n"
LOOP = "from helper import amount\n\ndef add(values):\n    values[0] += amount()\n"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """What the loop adds, compiled as in a new process, when its helper was written to add `amount`."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    # Without this, Python would take the old helper from its bytecode: the age and the size of the text are the same.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "loop.py").write_text(LOOP)
    os.utime(tmp_path / "loop.py", (0, 0))

    def compiled(amount: int) -> int:
        (tmp_path / "helper.py").write_text(HELPER.format(amount=amount))
        os.utime(tmp_path / "helper.py", (1, 1))
        monkeypatch.setitem(sys.modules, "helper", load(tmp_path / "helper.py"))
        compilation.sources_digest.cache_clear()
        values = np.zeros(1, np.int64)
        compilation.compile_loop(load(tmp_path / "loop.py").add, types.int64[::1])(values)
        return int(values[0])

    return compiled


def test_a_change_of_another_source_compiles_a_loop_again(
    added: Callable[[int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert added(1) == 1
    assert added(1) == 1
    assert len(list((tmp_path / "__pycache__").glob("*.nbi"))) == 1
    assert added(2) == 2
    assert len(list((tmp_path / "__pycache__").glob("*.nbi"))) == 2


def test_without_the_digest_a_loop_in_the_cache_is_used_though_it_is_old(
    added: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: numba compares the age of the loop's own file only."""
    digest = compilation.sources_digest
    constant = lambda folder: "same"  # noqa: E731
    constant.cache_clear = digest.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(compilation, "sources_digest", constant)
    assert added(1) == 1
    assert added(2) == 1


def test_the_digest_depends_on_names_and_texts_of_sources(tmp_path: Path) -> None:
    def digest() -> str:
        compilation.sources_digest.cache_clear()
        return compilation.sources_digest(tmp_path)

    (tmp_path / "a.py").write_text("1")
    first = digest()
    assert digest() == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = digest()
    (tmp_path / "b.py").write_text("2")
    assert len({first, renamed, digest()}) == 3
