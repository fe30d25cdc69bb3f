"""No process that the workbench starts imports a module from the current folder."""

import ast
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from workbench.child_processes import isolated_children, python

FOLDERS = ("workbench", "dashboards", "hooks", "kernels", "data", "docs", "notebooks", "scripts")
POOLS = {"LocalCluster", "ProcessPoolExecutor", "Pool", "Process", "Nanny", "get_context"}
SHELLS = {"os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "subprocess.getoutput"}


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every Python file and of the cells of every notebook."""
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if not p.is_symlink()):
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        lines = ("".join(cell["source"]).splitlines() for cell in cells)
        yield str(path.relative_to(ROOT)), "\n".join(x for cell in lines for x in cell if not x.startswith(("%", "!")))


def starts_without_isolation(text: str) -> list[str]:
    """What starts a process in which the current folder is searched for modules."""
    tree = ast.parse(text)
    isolated = {
        inner
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        and any("isolated_children" in ast.unparse(item.context_expr) for item in block.items)
        for inner in ast.walk(block)
    }
    return [
        f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)[:80]}"
        for node in ast.walk(tree)
        if _is_open_list(node) or (isinstance(node, ast.Call) and _is_open_call(node) and node not in isolated)
    ]


def _is_open_list(node: ast.AST) -> bool:
    """Whether it is a list with `sys.executable` that is not followed by -P or -I."""
    if not isinstance(node, ast.List):
        return False
    words = [ast.unparse(item) for item in node.elts]
    after = [words[i + 1 : i + 2] for i, word in enumerate(words) if word == "sys.executable"]
    after += [words[1:2] for word in words[:1] if word.strip("'").startswith("python")]
    return any(following not in (["'-P'"], ["'-I'"]) for following in after)


def _is_open_call(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    if called in SHELLS or any(k.arg == "shell" for k in call.keywords):
        return True
    return called.rpartition(".")[2] in POOLS


def test_every_start_of_a_process_is_isolated() -> None:
    unisolated = {name: starts for name, text in sources() if (starts := starts_without_isolation(text))}
    assert not unisolated


@pytest.mark.parametrize(
    "text",
    [
        "subprocess.run([sys.executable, '-m', 'workbench.cli'])",
        "subprocess.run(['python', '-c', 'pass'])",
        "command = ['timeout', '5', sys.executable, '-c', code]",
        "with LocalCluster() as cluster:\n    pass",
        "get_context('spawn').Process(target=f).start()",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
    ],
)
def test_the_scan_finds_a_start_without_isolation(text: str) -> None:
    assert starts_without_isolation(text)


@pytest.fixture
def folder_with_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A current folder in which somebody left modules of well-known names, which leave a file when they are run."""
    for name in ("pickle", "numpy", "runpy", "selectors", "tempfile"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'w')\nraise ImportError('planted')\n"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_in_the_current_folder_is_not_executed(folder_with_modules: Path) -> None:
    subprocess.run(python("-c", "import pickle, numpy, tempfile"), check=True)
    with isolated_children():
        process = multiprocessing.get_context("spawn").Process(target=tempfile.gettempdir)
        process.start()
        process.join()
    assert process.exitcode == 0
    assert not (folder_with_modules / "executed").exists()
    assert "PYTHONSAFEPATH" not in os.environ


def test_without_isolation_it_is_executed(folder_with_modules: Path) -> None:
    """The negative control."""
    subprocess.run([sys.executable, "-c", "import pickle"], check=False, capture_output=True)
    assert (folder_with_modules / "executed").exists()
