"""Shapes in signatures are checked while the tests run; one thread a process, as two cores share them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["workbench.kernels", "workbench.hooks", "workbench.model"], "beartype.beartype")

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def demo_run() -> Path:
    """The finished run that comes with the project; read only."""
    return DATA / "demo.zarr"
