"""The plan of the house: imports go one way, start-up is cheap, and nothing of ours shadows another package."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room → rooms it may import; the two wings meet in capture (which writes runs) and the command line.
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "kernels": set(),
    "hooks": {"errors"},
    "harmony": {"errors", "progress"},
    "model": {"kernels", "hooks", "harmony", "errors"},
    "runs": {"harmony", "errors", "progress"},
    "studies": {"runs", "harmony", "errors"},
    "figures": {"studies", "harmony", "errors"},
    "dashboards": {"figures", "studies", "runs", "harmony", "errors"},
    "capture": {"model", "hooks", "runs", "harmony", "errors", "progress"},
    "data": {"model", "kernels", "hooks", "harmony", "capture", "errors", "progress"},
    "bench": {
        "kernels",
        "hooks",
        "model",
        "harmony",
        "capture",
        "runs",
        "studies",
        "dashboards",
        "errors",
        "progress",
    },
    "experiments": {"model", "kernels", "hooks", "capture", "runs", "studies", "harmony", "errors", "progress"},
    "cli": {
        "bench",
        "experiments",
        "model",
        "capture",
        "runs",
        "studies",
        "figures",
        "dashboards",
        "harmony",
        "errors",
    },
}
TORCH_FREE = ("runs", "studies", "figures", "dashboards", "harmony")


def modules() -> list[Path]:
    return [p for p in (ROOT / "workbench").rglob("*.py", recurse_symlinks=True)] if sys.version_info >= (3, 13) else [
        p for room in (ROOT / "workbench").iterdir() for p in ([room] if room.suffix == ".py" else room.rglob("*.py"))
    ]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Dotted names of what a file imports, late imports and type-checking ones included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "workbench").parts[0].removesuffix(".py")


def wrong_turns(path: Path) -> list[str]:
    room = room_of(path)
    reached = {name.split(".")[1] for name in imports_of(path) if name.startswith("workbench.")}
    return sorted(reached - MAY_IMPORT[room] - {room, "__version__"})


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    if path.parent == ROOT / "workbench" and path.name == "__init__.py":
        return
    assert not wrong_turns(path), f"{room_of(path)} may import {sorted(MAY_IMPORT[room_of(path)])}"


def test_the_import_test_sees_a_wrong_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAY_IMPORT, "capture", {"model"})
    assert "runs" in wrong_turns(ROOT / "workbench/capture/job.py")


@pytest.mark.parametrize("room", TORCH_FREE)
def test_the_reading_wing_never_names_torch(room: str) -> None:
    for path in (ROOT / "workbench" / room).rglob("*.py"):
        torches = {n for n in imports_of(path) if n.split(".")[0] in ("torch", "transformer_lens", "transformers")}
        assert not torches, path


def test_there_is_no_circle_between_rooms() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [room for room, needs in MAY_IMPORT.items() if room not in order and needs <= set(order) | {room}]
        assert free, f"a circle among {set(MAY_IMPORT) - set(order)}"
        order += free


def test_the_linked_rooms_shadow_nobody() -> None:
    for name in ("kernels", "hooks", "dashboards", "data"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "workbench" / name).is_symlink()
        found = run(f"import importlib.util; print(importlib.util.find_spec({name!r}))")
        assert str(ROOT) not in found, f"import {name} finds our folder"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_importing_the_package_costs_milliseconds() -> None:
    code = "import time; t = time.perf_counter(); import workbench; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_studies_leave_torch_unloaded() -> None:
    code = "import sys, workbench as wb; wb.studies; wb.runs; wb.figures; wb.harmony; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_help_takes_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([Path(sys.executable).with_name("workbench"), "--help"], capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert b"capture" in done.stdout
    assert min(times) < 1.0, times
