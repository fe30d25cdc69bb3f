"""Figures as journals require: of column width, readable, with captions, and reproducible."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from tests.figures.conftest import shared_studies
from workbench import studies
from workbench.errors import InputError
from workbench.figures import export, paper, routing
from workbench.figures.template import THEMES

SCRIPTS = sorted((Path(__file__).parents[2] / "notebooks" / "figures").glob("*.py"))


@pytest.fixture(scope="module")
def figures():
    with shared_studies():
        drawn, left_out = paper.figures_of_run(wb.open_run(DATA / "demo.zarr"))
    # some studies need other captures: with --routing host, and with --record of activations or neurons
    needed = ("recorded host_routing", "recorded activations", "recorded neurons", "recorded features")
    assert [why for why in left_out if not any(text in why for text in needed)] == []
    return drawn


@pytest.fixture(scope="module")
def screens(figures):
    """Every figure as it is on a screen, drawn once; read only."""
    return {name: drawing.draw() for name, drawing in figures.items()}


def points(figure):
    """Sizes of all type in a figure, in points of 1/72 inch."""
    plain = figure.to_dict()
    plain["layout"].pop("template")  # what is given in the figure itself is what counts
    text = json.dumps(plain, default=str, separators=(",", ":"))
    return [float(size) * 72 / 96 for size in re.findall(r'"(?:tick)?font":\{"size":([\d.]+)', text)]


@pytest.mark.parametrize("column", ["single", "double"])
def test_a_figure_is_as_wide_as_a_column_in_seven_point_type(screens, column):
    for name, screen in screens.items():
        fitted = paper.fit(screen, column)
        assert fitted.layout.width / 96 * 25.4 == pytest.approx(paper.MM[column], abs=0.2), name
        assert fitted.layout.title.text is None
        assert not any("workbench" in a.text for a in fitted.layout.annotations)
        assert len(fitted.data) == len(screen.data)
        sizes = points(fitted)
        assert sizes
        assert sizes == pytest.approx([7] * len(sizes))
        assert screen.layout.title.text  # what was given is not changed
    screen = points(next(iter(screens.values())))
    assert screen
    assert screen != pytest.approx([7] * len(screen))


def test_the_sets_are_apart_and_the_main_one_is_first(figures):
    run = wb.open_run(DATA / "demo.zarr")
    main = [name for name in paper.main_figures() if name in figures]
    assert list(figures)[: len(main)] == main
    assert len(main) >= 8
    for which in ("mian", ""):
        with pytest.raises(InputError, match="choose from all, main, supplement"):
            paper.figures_of_run(run, which)
    with pytest.raises(InputError, match="choose from screen, single, double"):
        paper.fit(next(iter(figures.values())).draw(), "triple")


def test_each_comes_with_caption_numbers_and_provenance(figures, tmp_path):
    few = {name: figures[name] for name in (*list(figures)[:2], list(figures)[-1])}
    export.write_gallery(few, tmp_path, ("html",), column="single")
    run = wb.open_run(DATA / "demo.zarr")
    for name, drawing in few.items():
        caption = (tmp_path / f"{name}.txt").read_text()
        assert drawing.draw().layout.title.text in caption
        assert drawing.source.attrs["method"] in caption
        assert "Not controlled:" in caption
        provenance = json.loads((tmp_path / f"{name}.json").read_text())
        assert provenance["run_digest"] == run.digest
        assert provenance["column"] == "single"
        assert isinstance(provenance["parameters"], dict)
        assert (tmp_path / f"{name}.csv").read_text().count("\n") == len(drawing.table()) + 1
    index = (tmp_path / "index.md").read_text()
    assert index.index("## Main text") < index.index(f"`{next(iter(few))}`") < index.index("## Supplement")
    assert "**Figure S1**" in index


@pytest.mark.browser
def test_the_same_run_gives_the_same_bytes(figures, tmp_path):
    few = dict(list(figures.items())[:4])
    written = []
    for again in ("a", "b"):
        paths = export.write_gallery(few, tmp_path / again, ("svg",), column="double")
        # plotly numbers its clip paths at random
        written.append(
            {p.name: re.sub(r"(?<=[-_#\"])?[0-9a-f]{6}(?=[xy\"\-)]|xy)", "ID", p.read_text()) for p in paths}
        )
    assert written[0] == written[1]
    assert any("<svg" in text for text in written[0].values())


def in_this_process(script, *arguments):
    """The exit code and the standard error of a script, with the shared results of the studies of the demo run."""
    errors, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors), shared_studies():
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(studies, "run_study", paper.run_study)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
            if isinstance(left.code, str):  # what Python does at the end of a process
                print(left.code, file=sys.stderr)
    return code, errors.getvalue()


def in_its_own_process(script, *arguments):
    """The exit code and the standard error of a script as a user starts it."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_makes_its_figure_and_states_how_it_is_used(script, tmp_path):
    """The first in a process of its own; the others here, where nothing is imported or computed a second time."""
    start = in_its_own_process if script == SCRIPTS[0] else in_this_process
    code, errors = start(script, str(DATA / "demo.zarr"), str(tmp_path), "pdf")
    assert code == 0, errors
    made = {path.suffix for path in tmp_path.iterdir()}
    assert made == {".pdf", ".csv", ".txt", ".json", ".md"}
    assert all(path.read_bytes().startswith(b"%PDF-") for path in tmp_path.glob("*.pdf"))
    code, lost = in_this_process(script, str(tmp_path / "none.zarr"), str(tmp_path))
    assert code == 1
    assert "does not exist" in lost
    assert lost.count("\n") == 1
    code, alone = in_this_process(script)
    assert code == 1
    assert "RUN OUT" in alone


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_values_differ_in_grey(theme):
    """Relative luminance rises or falls all the way along the scale; a rainbow would not."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def steps(colours):
        return np.diff([luminance(c) for c in colours])

    scale = steps(THEMES[theme].sequential)
    assert (scale > 0.005).all() or (scale < -0.005).all()
    rainbow = steps(["#ff0000", "#ffff00", "#00ff00", "#00ffff", "#0000ff"])
    assert not (rainbow > 0).all()
    assert not (rainbow < 0).all()


def test_less_is_marked_where_grey_cannot_tell_it_from_more(figures):
    """Both ends of a diverging scale are dark: cells that are less carry a minus."""
    names = [n for n in figures if n.startswith("routing_difference")]
    assert names
    for name in names:
        div = figures[name].source
        less = (div["difference"].values < 0) & div["expert_different"].values
        drawn = routing.load_difference_heatmap(div)
        marks = [t for t in drawn.data if t.type == "scatter" and t.marker.symbol == "line-ew" and t.x[0] is not None]
        assert sum(len(t.x) for t in marks) == less.sum()
