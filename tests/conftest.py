"""Shapes in signatures are checked while the tests run; one thread a process, as two cores share them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook(["workbench.kernels", "workbench.hooks", "workbench.model"], "beartype.beartype")
