"""Every notebook runs from top to bottom, and is kept without outputs or with those of its present source."""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tests.model.fake_gpus import run_on_gpus

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Notebook → a text of its cells → what stands there in a test without --long: the same cells with fewer sequences,
# fewer doses, or commands of which only the first is a process of its own.
LESS_WORK = {
    "causal": {
        "sequences=60": "sequences=30",
        "steer = run_experiment(": (
            "from workbench.experiments import steering\nsteering.DOSES = (-1.0, 1.0)\nsteer = run_experiment("
        ),
    },
    "scale": {
        "    print(subprocess.run(": (
            "    if words[0] != 'info':\n"
            "        from workbench.cli import app\n"
            "        return app(list(map(str, words)), standalone_mode=False)\n"
            "    print(subprocess.run("
        ),
    },
    "methods": {
        "sequences=60, conversations=3": "sequences=15, conversations=1",
        "for row in rows if row.effort": "for row in rows[:24] if row.effort",
    },
    "experts": {
        '["task"] == task][:8]': '["task"] == task][:2]',
        "sums[::3]": "sums",
        'load_matched(cell["share"].values, top, 20)': 'load_matched(cell["share"].values, top, 4)',
        '["task"] == task][-6:]]\n    ways': '["task"] == task][-2:]]\n    ways',
    },
}


def shortened(notebook: Any, changes: dict[str, str]) -> Any:
    """Return the notebook with texts of its cells replaced; every one of them has to be there."""
    for text, shorter in changes.items():
        cells = [cell for cell in notebook.cells if text in cell.source]
        assert cells, f"no cell has {text!r}"
        for cell in cells:
            cell.source = cell.source.replace(text, shorter)
    return notebook


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, long: bool) -> None:
    notebook = shortened(nbformat.read(path, as_version=4), {} if long else LESS_WORK.get(path.stem, {}))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert list(tmp_path.iterdir()) == [], "a notebook leaves no file"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hooks", "quickstart"])
def test_the_first_notebooks_run_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated GPU, where `device="auto"` puts the model."""
    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    monkeypatch.chdir(tmp_path)
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert run_on_gpus(cells, monkeypatch).devices == {torch.device("cuda", 0)}


def runner() -> ModuleType:
    """Return the script that stores outputs."""
    path = ROOT / "scripts" / "run_notebooks.py"
    spec = importlib.util.spec_from_file_location("run_notebooks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(notebook: Any) -> list[str]:
    """Return what is wrong with the stored outputs of a notebook; none are right, too."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs or cell.execution_count for cell in cells):
        return []
    problems = []
    if notebook.metadata.get("outputs_of") != runner().digest(notebook):
        problems.append("the outputs are of another source: run scripts/run_notebooks.py")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        problems.append("the cells were not run in order")
    outputs = [output for cell in cells for output in cell.outputs]
    if any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs):
        problems.append("an error or a warning is stored")
    if any(runner().is_progress(output) for output in outputs):
        problems.append("a progress bar is stored")
    texts = [output.get("text", "") for output in outputs]
    texts += [value for output in outputs for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    if any(runner().without_folders(text) != text or str(ROOT) in text for text in texts):
        problems.append("a folder of this machine is stored")
    figures = [cell for cell in cells if cell.source.strip().splitlines()[-1].startswith("wb.figures.")]
    if not all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in figures):
        problems.append("a figure is not a picture")
    return problems


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_no_outputs_or_its_own(path: Path) -> None:
    assert faults(nbformat.read(path, as_version=4)) == []
    assert path.stat().st_size < 600_000


def test_outputs_that_are_old_or_have_warnings_are_found() -> None:
    """Negative controls."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in ("1", "2")])
    notebook.metadata["outputs_of"] = runner().digest(notebook)
    assert faults(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
    assert faults(notebook) == []
    code[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="a warning")]
    assert faults(notebook) == ["an error or a warning is stored"]
    code[0].outputs = [
        nbformat.v4.new_output("display_data", {"text/html": '<div><progress max="2" value="2"></progress></div>'}),
        nbformat.v4.new_output("stream", name="stdout", text=f"{tempfile.gettempdir()}/tmp_01abcde/run.zarr: valid"),
    ]
    assert faults(notebook) == ["a progress bar is stored", "a folder of this machine is stored"]
    code[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="a warning")]
    code[0].source = "wb.figures.routing"
    code[0].execution_count = 2
    assert len(faults(notebook)) == 4
