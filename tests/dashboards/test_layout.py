"""The frame of a page shows text of a run as text only."""

import shutil
from pathlib import Path

from tests.conftest import DATA
from workbench.dashboards import app
from workbench.dashboards.layout import missing_page
from workbench.dashboards.state import RunRegistry


def test_a_run_name_is_only_text_in_the_template(tmp_path: Path) -> None:
    """Panel's template puts the title into the page as it is: `<img onerror=…>` once ran there."""
    path = tmp_path / "<img src=x onerror=alert(1)>.zarr"
    shutil.copytree(DATA / "demo.zarr", path)
    registry = RunRegistry([path])
    (name,) = registry.names
    template = app._template(registry, "overview")
    assert "<" in name, "otherwise the test proves nothing"
    assert "<" not in template.title
    assert "&lt;img" in template.title
    assert "<" not in template.texts["run_name"]


def test_the_page_for_an_unknown_address_links_to_the_pages() -> None:
    text = missing_page({"overview": "Overview", "a&b": "<script>"})
    assert '<a href="/overview">' in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
