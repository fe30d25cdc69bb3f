"""Figures as files for a paper: SVG, PDF, PNG and self-contained HTML, each with the numbers behind it as CSV."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.studies.files import write_files

FORMATS = ("svg", "pdf", "png", "html")
# 920 points wide at 3 pixels a point: 300 dots an inch at 23 cm
PNG_SCALE = 3


def write(
    figures: Mapping[str, go.Figure],
    data: Mapping[str, pd.DataFrame],
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write `NAME.FORMAT` for every figure and format, and `NAME.csv`; nothing is written unless everything was made."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"format {', '.join(unknown) or 'missing'}; choose from {', '.join(FORMATS)}")
    if figures.keys() != data.keys():
        unpaired = sorted(figures.keys() ^ data.keys())
        raise InputError(f"every figure goes with its data; without a partner: {', '.join(unpaired)}")
    files: dict[str, str | bytes] = {
        f"{name}.csv": table.to_csv(index=False, lineterminator="\n") for name, table in data.items()
    }
    images = [suffix for suffix in FORMATS if suffix in formats and suffix != "html"]
    if images and figures:
        files |= _images(figures, images)
    if "html" in formats:
        for name, figure in figures.items():
            page = figure.to_html(include_plotlyjs=True, full_html=True, div_id=name)
            files[f"{name}.html"] = page
    return write_files(files, out)


def _images(figures: Mapping[str, go.Figure], formats: Sequence[str]) -> dict[str, str | bytes]:
    """All images from one browser: starting it takes longer than drawing."""
    try:
        import kaleido
        from choreographer.errors import ChromeNotFoundError
    except ImportError as error:
        raise InputError(
            f"{', '.join(formats)} need kaleido; install gpt-oss-workbench[figures], or ask for html"
        ) from error
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
                f"{', '.join(formats)} need Chromium or Chrome, and none was found; install one (or set BROWSER_PATH to "
                "it), or ask for html"
            ) from error
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
