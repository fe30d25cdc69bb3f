"""The room opens without torch, and has what it says."""

import subprocess
import sys

import workbench as wb


def test_the_room_is_exported_and_costs_nothing_to_open() -> None:
    code = "import sys, workbench as wb; wb.experiments; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    for name in wb.experiments.__all__:
        assert getattr(wb.experiments, name).__name__ == f"workbench.experiments.{name}"
        assert name in dir(wb.experiments)
