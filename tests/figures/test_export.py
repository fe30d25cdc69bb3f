"""Files for a paper: every format whole, with its data, from one browser, and nothing half-done without one."""

import re
import sys

import choreographer.errors
import kaleido
import pandas as pd
import plotly.graph_objects as go
import pytest
from choreographer.browsers.chromium import Chromium

from workbench.errors import InputError, JobError
from workbench.figures import export, paper, routing
from workbench.studies.synthetic import planted_run

MAGIC = {"svg": b"<svg", "pdf": b"%PDF-", "png": b"\x89PNG\r\n\x1a\n"}


@pytest.fixture
def one(div):
    return {"divergence": routing.divergence_by_layer(div)}, {"divergence": div["jsd"].to_dataframe().reset_index()}


@pytest.mark.browser
@pytest.mark.skipif(not Chromium.find_browser(skip_local=False), reason="no Chromium or Chrome on this machine")
def test_images_are_complete_and_come_from_one_browser(one, div, load, tmp_path, monkeypatch):
    started = []
    start = Chromium.__init__
    monkeypatch.setattr(Chromium, "__init__", lambda self, *a, **k: (started.append(1), start(self, *a, **k))[1])
    figures, data = one
    figures["load"] = routing.load_heatmap(load, "final", "low", theme="dark")
    data["load"] = load["tokens"].to_dataframe().reset_index()
    paths = export.write(figures, data, tmp_path, ("png", "svg", "pdf"))
    assert len(started) == 1
    assert {path.name for path in paths} == {f"{n}.{s}" for n in figures for s in ("csv", *MAGIC)}
    for path in paths:
        if path.suffix != ".csv":
            assert path.read_bytes().startswith(MAGIC[path.suffix[1:]]), path.name
    drawing = (tmp_path / "divergence.svg").read_text()
    assert "Divergence of routing by layer: analysis against final" in drawing
    assert "excess over chance (bit)" in drawing
    width = int.from_bytes((tmp_path / "load.png").read_bytes()[16:20])
    assert width == export.PNG_SCALE * figures["load"].layout.width


def test_html_opens_anywhere_without_a_browser_here(one, div, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    export.write(*one, tmp_path / "out", ("html",))
    page = (tmp_path / "out" / "divergence.html").read_text()
    assert re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"([^\"]*)\"", page) == ["plotly.min.js"]
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1_000_000
    assert "Divergence of routing by layer: analysis against final" in page
    assert '"showSendToCloud": false' in page
    table = pd.read_csv(tmp_path / "out" / "divergence.csv")
    assert table.jsd.dropna().tolist() == div["jsd"].dropna("layer").values.tolist()


def test_a_page_from_the_network_would_be_noticed():
    page = go.Figure().to_html(include_plotlyjs="cdn")
    assert any(url.startswith("http") for url in re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"([^\"]*)\"", page))


def test_images_without_a_browser_are_refused_with_the_remedy_and_nothing_is_written(one, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda cls, **_: None))
    with pytest.raises(InputError, match=r"svg need Chromium or Chrome.*install one.*or ask for html") as error:
        export.write(*one, tmp_path / "out", ("html", "svg"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["BrowserFailedError", "BrowserClosedError", "BrowserDepsError"])
def test_a_browser_that_does_not_start_is_one_line(kind, one, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        error = getattr(choreographer.errors, kind)
        raise error.__new__(error)  # one of them takes no message

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", fails)
    with pytest.raises(JobError, match="ended as soon as it was started: check that it runs"):
        export.write(*one, tmp_path / "out", ("svg",))
    assert not (tmp_path / "out").exists()


def test_images_without_kaleido_are_refused_with_the_remedy(one, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(InputError, match=r"need kaleido; install gpt-oss-workbench\[figures\], or ask for html"):
        export.write(*one, tmp_path / "out", ("pdf",))


def test_images_without_kaleido_are_refused_before_the_studies(tmp_path, monkeypatch):
    """Negative control: with kaleido, and for HTML without it, the studies begin."""

    def begun(*args):
        raise JobError("the studies began")

    monkeypatch.setattr(paper, "figures_of_run", begun)
    run = planted_run(seed=4, n_prompts=6)
    with pytest.raises(JobError, match="the studies began"):
        export.write_all(run, tmp_path, ("html", "png"))
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(InputError, match=r"^png need kaleido; install gpt-oss-workbench\[figures\], or ask for html"):
        export.write_all(run, tmp_path, ("html", "png"))
    with pytest.raises(JobError, match="the studies began"):
        export.write_all(run, tmp_path, ("html",))


@pytest.mark.parametrize("formats", [("jpg",), ("svg", "eps"), ()])
def test_unknown_formats_are_refused(one, formats, tmp_path):
    with pytest.raises(InputError, match="choose from svg, pdf, png, html"):
        export.write(*one, tmp_path, formats)


def test_a_figure_without_its_data_is_refused(one, tmp_path):
    figures, _ = one
    with pytest.raises(InputError, match="only one of the two is there: divergence"):
        export.write(figures, {}, tmp_path, ("html",))


@pytest.mark.parametrize("formats", [("html",), ("svg",)])
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_drawn(one, formats, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", lambda *a, **k: drawn.append(a))
    figures, data = ({"../divergence": part["divergence"]} for part in one)
    with pytest.raises(InputError, match="cannot be the name of a file"):
        export.write(figures, data, tmp_path / "out", formats)
    assert list(tmp_path.iterdir()) == drawn == []


def test_every_figure_of_a_run_is_written(tmp_path):
    run = planted_run(n_prompts=4, efforts=("low",), lengths={"final": 8})
    paths = export.write_all(run, tmp_path, ("html",))
    names = {path.name for path in paths}
    assert names - {"plotly.min.js", "index.md"} == {
        f"routing_{name}.{suffix}"
        for name in ("entropy_by_layer", "load_final_low", "special_in_task")
        for suffix in ("csv", "html", "txt", "json")
    }
