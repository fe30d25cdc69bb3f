"""A notebook in JupyterLab, by clicking: it runs, shows progress and figures as wide as the cell, without warnings."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import plotly
import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Page, expect

from tests.browser import expect_value, launched, open_page, read_until
from tests.serving import free_port, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
PROGRESS = """
import sys, time
from workbench.progress import progress
with progress("counting", 4, "steps") as advance:
    for _ in range(4):
        time.sleep(0.3); advance(1)
"""
WARNING = "import sys; print('a plain line, as without a notebook', file=sys.stderr)"
WIDTHS = """() => [...document.querySelectorAll('.jp-Notebook .js-plotly-plot')].map(figure =>
  figure.querySelector('.main-svg').getBoundingClientRect().width
  / figure.closest('.jp-OutputArea-output').clientWidth)"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """Start JupyterLab with two notebooks: quickstart with a progress bar at its end, and one with a warning."""
    quickstart = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    for cell in quickstart.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    quickstart.metadata["kernelspec"] = KERNEL
    quickstart.cells += [nbformat.v4.new_code_cell(PROGRESS), nbformat.v4.new_code_cell("print('the ' + 'end')")]
    nbformat.write(quickstart, tmp_path / "quickstart.ipynb")
    cells = [nbformat.v4.new_code_cell(WARNING), nbformat.v4.new_code_cell("print('the ' + 'end')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), tmp_path / "warning.ipynb")
    home, port = tmp_path / "home", free_port()
    folders = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=localhost"),
        *("--IdentityProvider.token=", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"),
        f"--ServerApp.root_dir={tmp_path}",
    ]
    extensions = Path(plotly.__file__).parents[4] / "share" / "jupyter"  # of the environment that plotly is in
    folders["JUPYTER_PATH"] = str(extensions)
    # without the server's part of jupyter-lsp, which is enabled there, every page asks in vain for lsp/status
    folders["JUPYTER_CONFIG_PATH"] = str(extensions.parents[1] / "etc" / "jupyter")
    environment = os.environ | folders | {"PYTHONPATH": str(NOTEBOOKS.parent), "JUPYTER_PLATFORM_DIRS": "1"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    wait_for(port, server)
    yield f"http://localhost:{port}/lab/tree"
    server.terminate()
    server.wait(300)
    shutil.rmtree(home, ignore_errors=True)


def run_all(page: Page, url: str) -> None:
    """Open a notebook and click Run, Run All Cells; wait for its last cell."""
    select = page.get_by_role("button", name="Select Kernel", exact=True)
    page.add_locator_handler(select, lambda button: button.click())  # a slow server makes JupyterLab ask
    page.goto(url)
    expect(page.locator(".jp-Notebook:visible .jp-CodeCell").first).to_be_visible()
    expect(page.get_by_role("button", name="(ipykernel) | Idle")).to_be_visible()  # else cells are not sent
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    end = page.locator(".jp-Notebook:visible .jp-OutputArea-output", has_text="the end")
    expect(end).to_be_visible()


def red_outputs(page: Page) -> list[str]:
    """Return the texts that JupyterLab shows in red: standard error and tracebacks."""
    kinds = ("application/vnd.jupyter.stderr", "application/vnd.jupyter.error")
    return [
        text for kind in kinds for text in page.locator(f".jp-Notebook [data-mime-type='{kind}']").all_inner_texts()
    ]


def test_quickstart_runs_by_clicking(lab: str) -> None:
    with launched() as browser:
        page = open_page(browser, viewport={"width": 1400, "height": 5000})  # tall: cells out of sight are not drawn
        missing: list[str] = []
        page.on("response", lambda response: missing.append(response.url) if response.status == 404 else None)
        run_all(page, f"{lab}/quickstart.ipynb")
        assert red_outputs(page) == []
        bar = page.locator(".jp-OutputArea-output progress")
        expect(bar).to_have_attribute("value", "4")
        expect(page.get_by_text("counting: 4 of 4 steps")).to_be_visible()
        expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()

        def fit(lowest: float) -> Callable[[list[float]], bool]:
            return lambda widths: len(widths) == 2 and all(lowest <= width <= 1.01 for width in widths)

        read_until(page, lambda: page.evaluate(WIDTHS), fit(0.97))
        page.set_viewport_size(
            {"width": 1000, "height": 5000}
        )  # a negative control: a figure of fixed width would stay
        page.wait_for_timeout(2000)
        read_until(page, lambda: page.evaluate(WIDTHS), fit(0.9))
        assert missing == []
        page.evaluate("fetch('/nothing').then(() => null)")  # a negative control: what is not there is noted
        read_until(page, lambda: missing, lambda urls: len(urls) == 1)
        again = open_page(browser)
        run_all(again, f"{lab.replace('/lab/', '/lab/workspaces/other/')}/warning.ipynb")
        # a negative control: red outputs are found
        expect_value(again, lambda: len(red_outputs(again)), 1)
