"""Figures for a journal: a column wide, 7-point type, the title in the caption, with provenance.

89 and 183 mm are the widths of one and two columns in most journals.
"""

import json
from collections.abc import Mapping
from typing import Literal, get_args

import plotly
import plotly.graph_objects as go

from workbench.bounded_json import parse_json
from workbench.errors import InputError
from workbench.figures.gallery import Gallery, GalleryItem
from workbench.figures.template import MARGIN_ABOVE, MARGIN_BELOW, WIDTH
from workbench.registry import studies
from workbench.studies import run_study
from workbench.studies.comparison import Run

Column = Literal["screen", "single", "double"]
Which = Literal["all", "main", "supplement"]
MM = {"single": 89, "double": 183}
PIXELS_A_MM = 96 / 25.4
_TYPE = 7 * 96 / 72  # 7 points in pixels
_ABOVE, _BELOW = 14, 62


def main_figures() -> list[str]:
    """Return the names of the figures for the main text, as `STUDY_NAME`; all others belong to the supplement."""
    return [f"{study.name}_{name}" for study in studies(runs=1) for name in study.main_figures]


def figures_of_run(run: Run, which: Which = "all") -> tuple[Gallery, list[str]]:
    """Return all figures of the studies of a run as `STUDY_NAME`, the main set first, and why studies were skipped.

    Raises:
        InputError: the set is unknown, or the run has no figure of it.
    """
    if which not in get_args(Which):
        raise InputError(f"set {which!r} is unknown; choose from {', '.join(get_args(Which))}")
    figures: Gallery = {}
    left_out = []
    for study in studies(runs=1):
        try:
            sets = run_study(study.name, run)
        except InputError as error:
            left_out.append(str(error))
            continue
        drawn: Gallery = study.load_figures().gallery(sets)
        figures |= {f"{study.name}_{name}": drawing for name, drawing in drawn.items()}
    if not figures:
        raise InputError(f"no study can be computed from this run: {'; '.join(left_out)}")
    main = [name for name in main_figures() if name in figures]
    order = {"all": [*main, *(n for n in figures if n not in main)], "main": main}
    chosen = order.get(which, [n for n in figures if n not in main])
    if not chosen:
        raise InputError(f"this run has none of the {which} figures; use --set all for every figure that it has")
    return {name: figures[name] for name in chosen}, left_out


def fit(figure: go.Figure, column: Column) -> go.Figure:
    """Return the figure at the width of a column, without title and footer, in 7-point type; `screen` keeps the size.

    Raises:
        InputError: the column width is unknown.
    """
    if column not in get_args(Column):
        raise InputError(f"column {column!r} is unknown; choose from {', '.join(get_args(Column))}")
    out = go.Figure(figure)
    if column == "screen":
        return figure if figure.layout.width else out.update_layout(width=WIDTH)  # made in a notebook, it has none
    width = round(MM[column] * PIXELS_A_MM)
    scale = max(width / WIDTH, 0.65)  # narrower columns are relatively taller: titles of axes must fit
    plot = (figure.layout.height - MARGIN_ABOVE - MARGIN_BELOW) * scale
    height = round(max(plot, 140) + _ABOVE + _BELOW)
    type_ = {"size": _TYPE}
    out.layout.annotations = [a for a in out.layout.annotations if a.yshift != 6 - MARGIN_BELOW]  # the foot
    out.update_layout(
        title=None,
        width=width,
        height=height,
        font=type_,
        margin={"l": 38, "r": 10, "t": _ABOVE, "b": _BELOW},
        legend={"y": 2 / height, "font": type_, "title": {"font": type_}},
    )
    out.update_annotations(font=type_)
    out.update_xaxes(title={"font": type_, "standoff": 4}, ticklen=3, tickfont=type_)
    out.update_yaxes(title={"font": type_, "standoff": 4}, ticklen=3, tickfont=type_)
    if "coloraxis" in out.layout:
        out.update_layout(
            coloraxis={"colorbar": {"thickness": 8, "ticklen": 3, "tickfont": type_, "title": {"font": type_}}}
        )
    for trace in out.data:
        if trace.type == "scatter":
            size, line = trace.marker.size, trace.line.width
            trace.update(
                marker={"size": 0.65 * size} if isinstance(size, int | float) else {},
                line={"width": 0.7 * line} if line else {},
            )
    return out


def caption(drawing: GalleryItem, figure: go.Figure) -> str:
    """Return the caption as plain text: what the figure shows, how it was computed and what is not controlled."""
    attrs = drawing.source.attrs
    sentences = [figure.layout.title.text, figure.layout.title.subtitle.text, attrs.get("method", "")]
    if attrs.get("not_controlled"):
        sentences.append(f"Not controlled: {attrs['not_controlled']}")
    return " ".join(text if text.endswith(".") else f"{text}." for text in sentences if text) + "\n"


def provenance(drawing: GalleryItem, column: Column) -> str:
    """Return the provenance of a figure as JSON: run, parameters and versions with which it can be made again."""
    attrs = {k: v for k, v in drawing.source.attrs.items() if k not in ("summary", "method", "not_controlled")}
    attrs["parameters"] = parse_json(attrs.get("parameters", "{}"))
    plain = {k: v if isinstance(v, str | dict) else getattr(v, "item", lambda v=v: v)() for k, v in attrs.items()}
    return json.dumps(plain | {"column": column, "plotly": plotly.__version__}, indent=1, sort_keys=True) + "\n"


def index(captions: Mapping[str, str]) -> str:
    """Return a page that lists the figures, those of the main text first."""
    lines, main = ["# Figures", ""], main_figures()
    for heading, names in (
        ("Main text", [n for n in captions if n in main]),
        ("Supplement", [n for n in captions if n not in main]),
    ):
        lines += [f"## {heading}", ""] if names else []
        for number, name in enumerate(names, start=1):
            lines += [f"**Figure {'' if heading == 'Main text' else 'S'}{number}** (`{name}`). {captions[name]}"]
    return "\n".join(lines)
