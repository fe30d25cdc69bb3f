"""Shapes in signatures are checked in the tests of the model; one thread a process, as two cores share them.

Triton interprets its kernels, so that their real launchers run on CPU tensors. It has to know before the first kernel
is defined; tests that compile kernels do so in a process of their own. GPUs are hidden, so that the tests do the same
on a machine that has one: `workbench bench gpu --first` checks a GPU.
"""

import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests import typechecking
from tests.interpreted_triton import replace_language_once_for_a_launch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
# Not kernels/gpu: a kernel that is wrapped in a check is no longer one that Triton can read.
KERNELS = [f"workbench.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")]
# Nor modules that numba compiles: a wrapped function is no longer the one in the file.
MODEL = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "workbench" / "model").rglob("[!_]*.py")
    if not path.stem.endswith("_loops")
]
# jsonschema, which nbformat imports, would take four seconds to compile a grammar of IRIs, which no notebook has
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
CHECK = f"{typechecking.__name__}.check_calls"
replace_language_once_for_a_launch()
install_import_hook([*KERNELS, "workbench.hooks", *MODEL], CHECK)
# Files whose tests take up to a minute each come first, so that all workers end at about the same time.
LONGEST = ("test_packaging.py", "test_howto_tasks.py", "test_docs.py", "test_notebooks.py", "test_faults.py")
# Tests of these packages and modules run with the checks, which double the time of a short pass; others, and slow ones,
# do not. The modules are of `workbench.experiments`; `tests/experiments/conftest.py` decorates them. Of a test with
# many parameters, the first four cases do and then every fourth: they call the same functions.
CHECKED_FIRST = 4
CASE = pytest.StashKey[int]()  # the number of a test among those with other parameters
CHECKED = ("hooks", "kernels", "model")
CHECKED_EXPERIMENTS = (
    "attribution",
    "gradients",
    "jacobians",
    "lens",
    "residual_attribution",
    "activations",
    "token_selection",
    "norm_attribution",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="run long simulations, full matrices and many trials; their results are committed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis try the same cases each time, however busy the machine is; with --long, others each time."""
    settings.register_profile(
        "suite",
        deadline=None,
        derandomize=not config.getoption("--long"),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("suite")


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether the long versions of tests are wanted."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(scope="session")
def demo_run() -> Path:
    """The finished run that comes with the project; read only."""
    return DATA / "demo.zarr"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Check shapes, or not, in a test and its fixtures."""
    package = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
    module = item.path.stem.removeprefix("test_")
    wanted = package in CHECKED or (package == "experiments" and module in CHECKED_EXPERIMENTS)
    checked = wanted and item.get_closest_marker("slow") is None
    case = item.stash.get(CASE, 0)
    checked &= case < CHECKED_FIRST or case % CHECKED_FIRST == 0
    jaxtyping.config.update("jaxtyping_disable", not checked)
    return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked long unless they are asked for with --long; begin with the longest ones."""
    cases = defaultdict[str, Iterator[int]](itertools.count)
    for item in items:
        item.stash[CASE] = next(cases[item.nodeid.partition("[")[0]])
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
