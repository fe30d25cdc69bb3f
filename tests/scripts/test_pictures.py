"""The script that renews the pictures of the documentation lists every picture, and refuses other names."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pictures.py"
pytest.importorskip("playwright.sync_api")


def test_every_picture_of_the_documentation_can_be_renewed() -> None:
    spec = importlib.util.spec_from_file_location("pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.stem for path in (ROOT / "docs").glob("*.png")} == set(module.PICTURES)


def test_an_unknown_picture_is_refused_in_one_line() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "sunset"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "unknown picture sunset: expected some of dashboard, transcript, graph, live" in result.stderr
