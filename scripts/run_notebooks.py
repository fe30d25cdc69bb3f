"""Run the notebooks and store their outputs, with figures as pictures that code hosts show.

    python scripts/run_notebooks.py            # all
    python scripts/run_notebooks.py routing    # those of these names

Tests refuse a notebook whose outputs are of another source, or have errors or warnings.
"""

import base64
import hashlib
import io
import json
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
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": scratch}}).execute()
    del notebook.cells[0]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = output.data["text/plain"].replace(f"{FOLDER.parent}/workbench/", "")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata[MARK] = digest(notebook)
    notebook.metadata["kernelspec"] = KERNEL  # without it JupyterLab asks for a kernel first
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB", flush=True)


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
