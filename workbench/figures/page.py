"""HTML pages without network requests: a style for both themes, tables, and figures drawn when they come into view.

Every text is escaped here. Figures are embedded as JSON for the light and for the dark theme; the reader's browser
chooses.
"""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from workbench.counting import signed
from workbench.figures.template import THEMES, Theme, ThemeName

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")
_LINK = {"light": "#14508c", "dark": "#8cc4f2"}

Draw = Callable[..., go.Figure]  # takes theme=


def document(title: str, body: Iterable[str], *, plotly: str | None = None) -> str:
    """Return a complete HTML page.

    plotly: the address of plotly.js beside the page; None: it is part of the page; "": the page has no figures.
    """
    scripts = [f"<script>{get_plotlyjs()}</script>" if plotly is None else f'<script src="{escape(plotly)}"></script>']
    scripts.append(f"<script>{_SCRIPT.read_text(encoding='utf-8')}</script>")
    library = "" if plotly == "" else "".join(scripts)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>",
            *body,
            f"</main>{library}</body></html>",
        ]
    )


def _style() -> str:
    def colours(name: ThemeName) -> str:
        theme: Theme = THEMES[name]
        return (
            f"--paper:{theme.paper};--ink:{theme.ink};--muted:{theme.muted};--grid:{theme.grid};"
            f"--effect:{theme.channel['analysis']};--link:{_LINK[name]}"
        )

    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{colours('dark')}}}}}"
    return f":root{{{colours('light')}}}{dark}{_STYLE.read_text(encoding='utf-8')}"


def figure(name: str, draw: Draw) -> str:
    """Return HTML of a figure in both themes. name: its id, unique in the page."""
    safe = escape(name)
    drawn = {theme: draw(theme=theme) for theme in THEMES}
    height = next(iter(drawn.values())).layout.height or 480
    data = "".join(
        f'<script type="application/json" id="{safe}-{theme}">{_json(one)}</script>' for theme, one in drawn.items()
    )
    return f'<figure><div id="{safe}" data-figure style="height:{int(height)}px"></div>{data}</figure>'


def _json(drawn: go.Figure) -> str:
    """Return the figure as JSON that cannot end the script element it is in."""
    text: str = drawn.to_json()
    return text.replace("<", "\\u003c")


class Link(NamedTuple):
    """A cell of a table that leads to another page."""

    text: str
    address: str


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> str:
    """Return an HTML table. numbers: the columns that are aligned to the right."""

    def cells(row: Sequence[object], tag: str) -> str:
        kinds = [' class="number"' if column in numbers else "" for column in header]
        return "".join(f"<{tag}{kind}>{_cell(c)}</{tag}>" for kind, c in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(header, "th")}</tr>{body}</table></div>'


def _cell(content: object) -> str:
    if isinstance(content, Link):
        return f'<a href="{escape(content.address)}">{escape(content.text)}</a>'
    return escape(str(content))


def folded(title: str, *parts: str) -> str:
    """Return HTML that is shown on a click on its title."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def paragraphs(text: str, css: str = "") -> str:
    """Return text as HTML, a paragraph for each line."""
    mark = f' class="{css}"' if css else ""
    return "".join(f"<p{mark}>{escape(line)}</p>" for line in text.splitlines() if line.strip())


def bar(difference: float, low: float, high: float, widest: float) -> str:
    """Return a small picture of an effect with its interval on an axis from −widest to widest."""

    def x(value: float) -> float:
        return round(75 + 70 * max(-1.0, min(1.0, value / widest)), 1)

    label = f"{signed(difference, 3, 'g')}, interval from {signed(low, 3, 'g')} to {signed(high, 3, 'g')}"
    return (
        f'<svg viewBox="0 0 150 26" role="img" aria-label="{escape(label)}">'
        '<line x1="75" x2="75" y1="3" y2="23" stroke="var(--muted)"/>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="13" y2="13" stroke="var(--effect)" stroke-width="3"/>'
        f'<circle cx="{x(difference)}" cy="13" r="5" fill="var(--effect)"/></svg>'
    )
