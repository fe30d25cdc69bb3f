"""Figures as files for a paper: SVG, PDF, PNG and HTML without network requests, each with its data as CSV."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.offline import get_plotlyjs

from workbench.errors import InputError, JobError
from workbench.figures import paper
from workbench.figures.gallery import GalleryItem
from workbench.outputs import check_files, refuse_paths, write_files
from workbench.studies.comparison import Run
from workbench.studies.result import csv_text

PLOTLY_JS = "plotly.min.js"
FORMATS = ("svg", "pdf", "png", "html")
# 96 pixels an inch times this: 300 dots an inch
PNG_SCALE = 300 / 96
# plotly's own pages offer to upload the chart, and routing is nearly as private as the text
PAGE_CONFIG = {"showSendToCloud": False, "displaylogo": False}


def write_all(
    run: Run,
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    *,
    column: paper.Column = "screen",
    which: paper.Which = "all",
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write every figure of every study of a run, `STUDY_NAME`; skip a study for which the run lacks something.

    Raises:
        InputError: a format or the column is unknown, a format needs a package that is not installed, or an output is
            an input or exists. All of this is checked before the studies, which take minutes.
    """
    _check(formats)
    if _image_formats(formats):
        _require_kaleido(formats)
    check_files(["index.md"], out, command="figures", inputs=inputs, overwrite=overwrite)
    paper.fit(go.Figure(layout={"height": 500}), column)  # refuse a wrong column before minutes of work
    figures, _ = paper.figures_of_run(run, which)
    return write_gallery(figures, out, formats, column=column, inputs=inputs, overwrite=overwrite)


def write_gallery(
    items: Mapping[str, GalleryItem],
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    *,
    column: paper.Column = "screen",
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write each figure with its numbers, caption (`.txt`) and provenance (`.json`), and `index.md`."""
    drawn = {name: drawing.draw() for name, drawing in items.items()}
    captions = {name: paper.caption(drawing, drawn[name]) for name, drawing in items.items()}
    beside = {f"{name}.txt": text for name, text in captions.items()}
    beside |= {f"{name}.json": paper.provenance(drawing, column) for name, drawing in items.items()}
    beside["index.md"] = paper.index(captions)
    figures = {name: paper.fit(figure, column) for name, figure in drawn.items()}
    tables = {name: drawing.table() for name, drawing in items.items()}
    return write(figures, tables, out, formats, beside, inputs=inputs, overwrite=overwrite)


def write(
    figures: Mapping[str, go.Figure],
    data: Mapping[str, pd.DataFrame | xr.Dataset],
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    beside: Mapping[str, str] | None = None,
    *,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write `NAME.FORMAT` for every figure and format, and `NAME.csv`, after all of them are made.

    data: of each figure a data frame, or a dataset, which becomes one.

    Raises:
        InputError: a figure has no data, or data has no figure.
    """
    _check(formats)
    if figures.keys() != data.keys():
        unpaired = sorted(figures.keys() ^ data.keys())
        names = ", ".join(unpaired)
        raise InputError(f"a figure and its data file belong together; only one of the two is there: {names}")
    refuse_paths(figures)
    files: dict[str, str | bytes] = {f"{name}.csv": csv_text(_frame(table)) for name, table in data.items()}
    files |= beside or {}
    images = _image_formats(formats)
    if images and figures:
        files |= _images(figures, images)
    if "html" in formats:
        files[PLOTLY_JS] = get_plotlyjs()  # once, beside the pages: 4.8 MB in each of 25 would be 120
        for name, figure in figures.items():
            files[f"{name}.html"] = figure.to_html(include_plotlyjs=PLOTLY_JS, div_id=name, config=PAGE_CONFIG)
    return write_files(files, out, command="figures", inputs=inputs, overwrite=overwrite)


def _frame(data: pd.DataFrame | xr.Dataset) -> pd.DataFrame:
    return data.to_dataframe().reset_index() if isinstance(data, xr.Dataset) else data


def _check(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"format {', '.join(unknown) or 'given'} is unknown; choose from {', '.join(FORMATS)}")


def _image_formats(formats: Sequence[str]) -> list[str]:
    """Return the formats that a browser draws."""
    return [suffix for suffix in FORMATS if suffix in formats and suffix != "html"]


def _require_kaleido(formats: Sequence[str]) -> None:
    """Refuse images where the package that makes them is not installed."""
    try:
        import choreographer.errors  # noqa: F401
        import kaleido  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{', '.join(_image_formats(formats))} need kaleido; install gpt-oss-workbench[figures], or ask for html"
        ) from error


def _images(figures: Mapping[str, go.Figure], formats: Sequence[str]) -> dict[str, str | bytes]:
    """Return all images from one browser: starting it takes longer than drawing."""
    _require_kaleido(formats)
    import kaleido
    from choreographer.errors import BrowserClosedError, BrowserDepsError, BrowserFailedError, ChromeNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        wanted = [
            {
                "fig": figure,
                "path": str(Path(folder) / f"{name}.{suffix}"),
                "opts": {"format": suffix, "scale": PNG_SCALE if suffix == "png" else 1},
            }
            for name, figure in figures.items()
            for suffix in formats
        ]
        try:
            # without MathJax, which would come from the network
            kaleido.write_fig_from_object_sync(wanted, kopts={"mathjax": False}, cancel_on_error=True)
        except ChromeNotFoundError as error:
            raise InputError(
                f"{', '.join(formats)} need Chromium or Chrome, and none was found; install one (or set "
                "BROWSER_PATH to it), or ask for html"
            ) from error
        except (BrowserClosedError, BrowserDepsError, BrowserFailedError) as error:
            raise JobError(
                f"{', '.join(formats)} need Chromium or Chrome, and it ended as soon as it was started: check that it "
                "runs on this machine and has enough memory, or ask for html"
            ) from error
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def script(
    draw: Callable[[Any], Mapping[str, GalleryItem]], open_run: Callable[[str], Run], *, column: paper.Column = "single"
) -> None:
    """Write the figures of a script called as `SCRIPT.py RUN OUT [FORMAT …]`, as those in notebooks/figures are."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} RUN OUT [svg|pdf|png|html …]")
    run, out, *formats = sys.argv[1:]
    try:
        for path in write_gallery(
            draw(open_run(run)), out, formats or ("pdf", "svg"), column=column, inputs=[run], overwrite=True
        ):
            print(path)
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
