"""The attention page: what its frame is given, which choices of a frame become part of the address, and a browser."""

import base64
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import workbench as wb
from tests.conftest import DATA
from workbench.cli import app
from workbench.dashboards import app as dashboards_app
from workbench.dashboards import attention_page
from workbench.dashboards.frame_view import chosen_view
from workbench.dashboards.search import vocabulary
from workbench.dashboards.state import RunRegistry
from workbench.dashboards.study_jobs import StudyJobs


def patterns(start: int, n: int) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims = ("layer", "head", "query", "key")
    pattern = rng.uniform(0, 1 / n, (2, 3, n, n))
    sink, earlier = rng.uniform(0, 0.3, (2, 3, n)), rng.uniform(0, 0.3, (2, 3, n))
    coords = {"layer": [1, 3], "query": range(start, start + n), "key": range(start, start + n)}
    return xr.Dataset({"pattern": (dims, pattern), "sink": (dims[:3], sink), "earlier": (dims[:3], earlier)}, coords)


def test_the_frame_has_the_sink_as_the_first_column(demo_run: Path) -> None:
    run, ds = wb.open_run(demo_run), patterns(4, 10)
    data = attention_page.pattern_data(run, 2, ds, vocabulary(run))
    assert len(data["texts"]) == 10
    assert (data["start"], data["layers"], data["windows"]) == (4, [1, 3], [None, None])
    rows = np.frombuffer(base64.b64decode(data["rows"]), dtype="<u2").reshape(2, 3, 10, 12) / 65535
    assert np.allclose(rows[..., 0], ds["sink"], atol=1e-4)
    assert np.allclose(rows[..., 1], ds["earlier"], atol=1e-4)
    assert np.allclose(rows[..., 2:], ds["pattern"], atol=1e-4)
    assert not np.allclose(rows[..., 0], ds["earlier"], atol=1e-2), "negative control: columns in another order"


def test_texts_of_a_run_cannot_end_the_frame(demo_run: Path) -> None:
    run = wb.open_run(demo_run)
    html = attention_page.frame(run, 2, patterns(0, 5), None, view={"layer": "</script><script>alert(1)</script>"})
    assert "</script><script>alert" not in html.replace("&lt;", "<").replace("&quot;", '"')
    assert 'sandbox="allow-scripts"' in html


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"layer": "3", "head": "1"}', {"layer": "3", "head": "1"}),
        ('{"layer": 3, "run": "other"}', {"layer": "3"}),
        ('{"layer": "<script>"}', {}),
        ("[1]", {}),
        ("{", {}),
    ],
)
def test_only_known_harmless_choices_are_stored(text: str, expected: dict[str, str]) -> None:
    assert chosen_view(text, ("layer", "head")) == expected


@pytest.mark.browser
def test_patterns_are_computed_on_request_and_the_address_reopens_them(demo: str, browser: object) -> None:
    from playwright.sync_api import expect

    from tests.dashboards.browsing import Session

    session = Session(browser, f"{demo}/attention?sequence=2&layer=1&head=3&token=40")  # type: ignore[arg-type]
    frame = session.page.frame_locator("iframe[title='attention patterns']")
    expect(frame.get_by_role("heading", name="Layer 1, head 3")).to_be_visible(timeout=240_000)
    expect(frame.get_by_text("position 40")).to_be_visible()
    expect(frame.get_by_role("cell", name="sink")).to_be_visible()
    frame.get_by_role("button", name="head 5").click()
    expect(frame.get_by_role("heading", name="Layer 1, head 5")).to_be_visible()
    session.page.wait_for_url(re.compile("head=5"))
    frame.locator(".t").nth(60).click()
    session.page.wait_for_url(re.compile("token=60"))
    again = Session(browser, session.page.url)  # type: ignore[arg-type]
    shown = again.page.frame_locator("iframe[title='attention patterns']")
    expect(shown.get_by_role("heading", name="Layer 1, head 5")).to_be_visible()
    expect(shown.get_by_text("position 60")).to_be_visible()
    assert session.errors == session.foreign == again.errors == []


@pytest.mark.parametrize("model", ["nano", None])
def test_one_model_serves_the_patterns_and_the_live_page(
    model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`workbench dashboard RUN --model M`; without a model there is no live page (the negative control)."""
    commands, seen = list[tuple[str, ...]](), dict[str, Any]()

    def serve(runs: list[str], **options: Any) -> None:
        seen.update(options)
        if "extra" in options:  # while the model's server is open, as in the real one
            template = options["extra"]["live"].show({"live": "Live"}, ())
            seen["title"], seen["main"] = template.texts["run_name"], len(template.main)
        registry = RunRegistry(runs, cache=tmp_path, model=options.get("model", "other"))
        with suppress(FileNotFoundError):  # the command that is not run writes no file
            registry.jobs._attention(runs[0], "digest", registry.model("demo"), 0, "", "out.npz")
        registry.jobs.close()

    monkeypatch.setattr(dashboards_app, "serve", serve)
    monkeypatch.setattr(StudyJobs, "_run", lambda self, *arguments: commands.append(arguments))
    done = CliRunner().invoke(app, ["dashboard", str(DATA / "demo.zarr"), *(["--model", model] if model else [])])
    assert done.exit_code == 0, done.output
    (command,) = commands
    assert command[command.index("--model") + 1] == (model or "other")
    assert (seen.get("title"), seen.get("main", 0) > 0) == ((model, True) if model else (None, False))
