"""In a notebook's kernel, progress is one bar that moves and nothing red; elsewhere it is plain lines."""

from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from workbench.notebook import notebook_display

_COUNT = """
from workbench.progress import progress
with progress("counting <b>", 3, "steps") as advance:
    for _ in range(3):
        advance(1)
"""
_PLAIN = "import workbench.progress as module; module.notebook_display = lambda: None"
_FIGURE = """
import pandas as pd, plotly.graph_objects as go
from workbench.figures.template import THEMES, WIDTH, apply_theme
from workbench.figures.paper import fit
figure = apply_theme(go.Figure(), THEMES["light"], pd.DataFrame(), title="t")
print(figure.layout.width, fit(figure, "screen").layout.width == WIDTH)
"""


def outputs(*sources: str) -> list[list[Any]]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.slow
def test_progress_is_one_bar_and_figures_have_the_width_of_the_cell() -> None:
    (bar,), (printed,), _, (lines,) = outputs(_COUNT, _FIGURE, _PLAIN, _COUNT)
    assert bar.output_type == "display_data"
    assert '<progress max="3" value="3"' in bar.data["text/html"]
    assert "counting &lt;b&gt;: 3 of 3 steps" in bar.data["text/html"]
    assert bar.data["text/plain"].startswith("counting <b>: 3 of 3 steps, ")
    assert printed.text == "None True\n"
    assert (lines.output_type, lines.name) == ("stream", "stderr"), "a negative control: lines, as without a notebook"


def test_this_process_is_no_notebook() -> None:
    assert notebook_display() is None
