"""Run the notebooks and store their outputs, with figures as pictures that code hosts show.

    python scripts/run_notebooks.py            # all
    python scripts/run_notebooks.py routing    # those of these names

Progress bars are left out, and texts name no folder of this machine. Tests refuse a notebook whose outputs are of
another source, or have errors, warnings, progress bars or such folders.
"""

import base64
import hashlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
MARK = "outputs_of"  # metadata: digest of the source that the outputs are of
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
_PICTURES = """
import plotly.io
plotly.io.renderers["png"].width, plotly.io.renderers["png"].scale = 920, 1
plotly.io.renderers.default = "png"
"""
_COLOURS = 64


def digest(notebook: Any) -> str:
    """Return a digest of the code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def run(path: Path) -> None:
    """Execute a notebook, and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_PICTURES))
    with tempfile.TemporaryDirectory() as scratch:
        options = {"timeout": 1800, "coalesce_streams": True, "resources": {"metadata": {"path": scratch}}}
        NotebookClient(notebook, **options).execute()
    del notebook.cells[0]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if not is_progress(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "text" in output:
                output.text = without_folders(output.text)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = without_folders(value)
                elif kind == "image/png":
                    output.data[kind] = _smaller(value)
    notebook.metadata[MARK] = digest(notebook)
    notebook.metadata["kernelspec"] = KERNEL  # without it JupyterLab asks for a kernel first
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB", flush=True)


def is_progress(output: Any) -> bool:
    """Return whether an output is a progress bar, which shows only how fast the machine was."""
    return "<progress " in output.get("data", {}).get("text/html", "")


def without_folders(text: str) -> str:
    """Return a text in which files of the project and temporary ones have no folder of this machine before them."""
    temporary = re.escape(tempfile.gettempdir())
    return re.sub(rf"{temporary}/tmp\w{{8}}/", "", text.replace(f"{FOLDER.parent}/workbench/", ""))


def _smaller(picture: str) -> str:
    """Return a PNG (base64) with few colours, which figures need no more of."""
    drawn = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(_COLOURS)
    out = io.BytesIO()
    drawn.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    for notebook_path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or notebook_path.stem in sys.argv[1:]:
            run(notebook_path)
