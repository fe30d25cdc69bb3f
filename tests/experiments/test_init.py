"""The package of experiments is imported without torch, and has the modules that it lists."""

import subprocess
import sys

import workbench as wb


def test_the_package_is_imported_without_torch_and_has_what_it_lists() -> None:
    code = "import sys, workbench as wb; wb.experiments; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    for name in wb.experiments.__all__:
        assert getattr(wb.experiments, name).__name__ == f"workbench.experiments.{name}"
        assert name in dir(wb.experiments)
