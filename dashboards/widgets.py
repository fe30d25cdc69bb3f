"""Building blocks of pages: figures and tables that can be saved, text, and content that is loaded later."""

import base64
import io
import json
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float

from workbench.dashboards.study_jobs import Answer
from workbench.dashboards.theme import ALERT_CSS, CARD_CSS, FIGURE_CSS, PARTS_CSS, TABULATOR_CSS, TOOL_CSS
from workbench.dashboards.theme import note as note_html
from workbench.errors import InputError
from workbench.figures.template import LEGEND_HEIGHT, MARGIN_BELOW
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.runs import Run
from workbench.studies.result import csv_text

WIDTH = 218  # pixels, of widgets in the sidebar
_FAILURES = 3  # to look for results, in turn, after which the last reason is shown
_PLAIN_ROWS = 15  # longer tables are paged
_LOCAL_ROWS = 2000  # longer tables are sorted, filtered and paged by the server
MOST_COLUMNS = 10  # that are readable beside each other at a width of 1280 pixels
_LONG = 32  # characters of a text that fits in a table beside two others
_SHORT = 16  # characters of texts that stay in one line, as an interval
_CSV = "Numbers as CSV"
_READABLE = {"min-width": "440px"}  # title and legend of a figure are readable; narrower windows scroll it
_SAVE = """
const figures = [];
const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (e.classList.contains('js-plotly-plot') && e.layout && e.layout.meta === NAME) figures.push(e);
  if (e.shadowRoot) walk(e.shadowRoot); } };
walk(document);
if (figures.length) window.Plotly.downloadImage(figures[0],
  {format: 'FORMAT', filename: NAME, width: 920, height: figures[0].layout.height || 500, scale: FORMAT_SCALE});
"""
_COPY = """
const text = CODE, button = this, label = button.textContent;
const selected = () => { // where the clipboard is refused, as on a page of another machine without TLS
  const field = document.body.appendChild(document.createElement("textarea"));
  field.value = text; field.select();
  const done = document.execCommand("copy");
  field.remove(); button.focus();
  return done; };
const copied = done => { button.textContent = done ? "Copied" : "Not allowed by the browser";
  setTimeout(() => { button.textContent = label; }, 2000); };
(navigator.clipboard ? navigator.clipboard.writeText(text) : Promise.reject()).then(() => true, selected).then(copied);
"""
_TABLE = """
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
td, th { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--wb-line);
  white-space: pre-wrap; }
th { color: var(--wb-muted); font-weight: 600; }
"""


def html(text: str) -> pn.pane.HTML:
    """Return an HTML pane. The caller must have escaped all text that came from a run or checkpoint."""
    return pn.pane.HTML(text, sizing_mode="stretch_width", stylesheets=[PARTS_CSS], margin=(4, 10))


def alert(text: str, kind: str = "warning") -> pn.pane.Alert:
    """Return an alert with escaped text."""
    return pn.pane.Alert(escape(text), alert_type=kind, stylesheets=[ALERT_CSS])


def unavailable(title: str, reason: str) -> pn.pane.HTML:
    """Return a note why there are no results; several reasons, as a study joins them, are a list."""
    reasons = list(dict.fromkeys(filter(None, (part.strip() for part in reason.split("Skipped: ")))))
    if len(reasons) == 1:
        return html(note_html(f"{title}: {reasons[0]}", "warning"))
    listed = "".join(f"<li>{escape(text[0].upper() + text[1:])}</li>" for text in reasons)
    return html(f"<div class='wb-note warning'>{escape(title)}:<ul class='wb-answers'>{listed}</ul></div>")


def empty_state(title: str, text: str, command: str = "") -> pn.pane.HTML:
    """Return what a page shows instead of results: why there are none, and the command that makes some. All escaped."""
    code = f"<pre>{escape(command)}</pre>" if command else ""
    shown = html(f"<div class='wb-empty'><h2>{escape(title)}</h2><p>{escape(text)}</p>{code}</div>")
    shown.margin = (6, 6)  # as a card
    return shown


def card(title: str, content: pn.viewable.Viewable, *, note: str = "", collapsed: bool = False) -> pn.Card:
    """Return a titled card that can be collapsed. note: which data it shows, as a line of text under the title."""
    return pn.Card(
        *([html(f"<p class='wb-under'>{escape(note)}</p>")] if note else []),
        content,
        title=title,
        sizing_mode="stretch_width",
        collapsed=collapsed,
        stylesheets=[CARD_CSS],
        margin=(6, 6),
    )


def beside(*pieces: pn.viewable.Viewable, width: int = 440) -> pn.FlexBox:
    """Return panes side by side where each has this width (pixels) at least, otherwise below each other."""
    # in columns of their own, so that margins do not make some wider than others
    columns = [
        pn.Column(piece, sizing_mode="stretch_width", styles={"flex": f"1 1 {width}px", "width": "auto"})
        for piece in pieces
    ]
    return pn.FlexBox(*columns, flex_wrap="wrap", align_items="flex-start", gap="0", sizing_mode="stretch_width")


def table(
    title: str,
    rows: pd.DataFrame,
    name: str,
    links: Mapping[str, Sequence[str]] | None = None,
    *,
    note: str = "",
    collapsed: bool = False,
) -> pn.Card:
    """Return a card with a table and a button that saves it as CSV; long tables can be sorted, filtered and paged.

    links: the address that each cell of a column opens, or "". note: which data it shows.
    """
    return card(title, table_content(rows, name, links), note=note, collapsed=collapsed)


def table_content(
    rows: pd.DataFrame, name: str, links: Mapping[str, Sequence[str]] | None = None
) -> pn.viewable.Viewable:
    """Return a table with what saves it as CSV, without the card; see `table`."""
    if len(rows) <= _PLAIN_ROWS:
        return _plain_table(rows, links or {}, _csv_link(rows, name))
    return pn.Column(_long_table(rows, links or {}), _csv(lambda: rows, name), sizing_mode="stretch_width")


def _csv_link(rows: pd.DataFrame, name: str) -> str:
    """Return HTML of a link that saves a short table; the browser has its rows, so the server is not asked."""
    data = base64.b64encode(csv_text(rows).encode()).decode()
    return (
        f'<a class="wb-save" download="{escape(name)}.csv" href="data:text/csv;charset=utf-8;base64,{data}">{_CSV}</a>'
    )


def _plain_table(rows: pd.DataFrame, links: Mapping[str, Sequence[str]], below: str = "") -> pn.pane.HTML:
    """Return a table of few rows; links: see `table`. below: HTML under it."""
    safe = rows.copy()
    for column in rows.columns:
        texts = [escape(str(text)) for text in rows[column]]
        if column in links:
            pairs = zip(links[column], texts, strict=True)
            safe[column] = [f'<a href="{escape(address)}">{text}</a>' if address else text for address, text in pairs]
        elif rows[column].dtype.kind not in "biuf":
            safe[column] = texts
    rows = rows.assign(**{column: rows[column].astype(str) for column in links})  # aligned and sorted as texts
    safe.columns = [escape(str(column)) for column in rows.columns]
    text = safe.rename_axis(columns=None).to_html(
        index=False, escape=False, border=0, na_rep="–", formatters=_formats(safe)
    )
    for column in rows.columns:  # pandas writes the headings in this order
        kind = "number" if rows[column].dtype.kind in "biuf" else "text"
        text = text.replace("<th>", f'<th scope="col" tabindex="0" aria-sort="none" data-sort="{kind}">', 1)
    words = (i for i, column in enumerate(rows.columns, 1) if rows[column].dtype.kind not in "biuf")
    left = "".join(f"td:nth-child({i}), th:nth-child({i}) {{ text-align: left; }}\n" for i in words)
    short = (i for i, column in enumerate(rows.columns, 1) if _widest(rows[column]) <= _SHORT)
    left += "".join(f"td:nth-child({i}) {{ white-space: pre; }}\n" for i in short)
    return html(f"<style>{_TABLE}{left}</style><div style='overflow-x:auto'>{text}</div><p>{below}</p>")


def _widest(values: pd.Series) -> int:
    """Return the number of characters of the longest text of a column."""
    return int(values.astype(str).str.len().max()) if len(values) else 0


def _long_table(rows: pd.DataFrame, links: Mapping[str, Sequence[str]]) -> pn.widgets.Tabulator:
    """Return a table that is sorted, filtered and paged in the browser; links: see `table`.

    Addresses, and what is read of a link, are in columns that are not shown, so that a column of links is sorted by its
    values: numbers as numbers.
    """
    texts = [c for c in rows.columns if rows[c].dtype.kind not in "biuf"]
    wide = len(rows.columns) > MOST_COLUMNS  # scrolls to the side, beside its first column
    shares = {} if wide else _shared_width(rows, texts)
    hidden = {column: (f"address {number}", f"text {number}") for number, column in enumerate(links)}
    extra = {hidden[column][0]: list(addresses) for column, addresses in links.items()}
    extra |= {hidden[column][1]: rows[column].astype(str).to_list() for column in links}
    return pn.widgets.Tabulator(
        rows.assign(**extra).reset_index(drop=True),
        hidden_columns=list(extra),
        show_index=False,
        disabled=True,
        selectable=False,
        layout="fit_data" if wide else "fit_columns" if shares else "fit_data_stretch",
        frozen_columns=[str(rows.columns[0])] if wide else [],
        widths=shares,
        pagination="local" if len(rows) <= _LOCAL_ROWS else "remote",
        page_size=_PLAIN_ROWS,
        sizing_mode="stretch_width",
        formatters={
            column: {"type": "plaintext" if wide or _widest(rows[column]) <= 2 * _LONG else "textarea"}
            for column in texts
        }
        | {column: _decimals(rows[column]) for column in rows.columns if rows[column].dtype.kind == "f"}
        | {column: {"type": "link", "urlField": url, "labelField": text} for column, (url, text) in hidden.items()},
        configuration={"columnDefaults": {"minWidth": 60, **({"maxWidth": 240, "tooltip": True} if wide else {})}},
        text_align={column: "right" for column in rows.columns if column not in texts},
        header_filters={column: {"type": "input", "placeholder": "filter"} for column in texts},
        theme="simple",
        stylesheets=[TABULATOR_CSS],
    )


def _shared_width(rows: pd.DataFrame, texts: Sequence[str]) -> dict[str, str]:
    """Return widths of columns in % by name, so that none is out of sight; {} if all texts fit beside each other.

    Numbers alone share the width, too: the last column would take all that is left of it, far from its heading.
    """
    lengths = {c: max(len(str(c)), _widest(rows[c]) if c in texts else 0) for c in rows.columns}
    # headings of numbers are broken into lines
    sizes = {c: min(max(length, 8), 2 * _LONG) if c in texts else 13 for c, length in lengths.items()}
    if texts and sum(sizes.values()) <= 3 * _LONG:
        return {}
    return {c: f"{100 * size / sum(sizes.values()):.1f}%" for c, size in sizes.items()}


def _decimals(values: Float[pd.Series, " row"]) -> dict[str, Any]:
    """Return the format of a column of numbers: as many decimals for all as one of them needs, three at most."""
    known = values[np.isfinite(values)].to_numpy(dtype=np.float64).round(3)
    precision = next((n for n in range(3) if np.array_equal(known, known.round(n))), 3)
    return {"type": "money", "decimal": ".", "thousand": ",", "symbol": "", "precision": precision}


def _formats(rows: pd.DataFrame) -> dict[str, Callable[[Any], str]]:
    integers = [str(c) for c in rows.columns if rows[c].dtype.kind in "iu"]
    return {column: "{:,}".format for column in integers}


def figure(
    drawn: go.Figure,
    name: str,
    numbers: Callable[[], pd.DataFrame] | None = None,
    *,
    python: str = "",
    click: Callable[[Any], None] | None = None,
) -> pn.Column:
    """Return a figure with buttons that save it as SVG, PNG and, if `numbers` is given, CSV.

    python: code that draws it, which a button copies. click: called with what plotly reports of a click.
    """
    drawn.update_layout(meta=name, width=None)
    _without_empty_legend(drawn)
    # plotly offers to upload a chart unless it is told not to
    config = {"showSendToCloud": False, "displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["toImage"]}
    pane = pn.pane.Plotly(drawn, sizing_mode="stretch_width", styles=_READABLE, config=config)
    if click is not None:
        pane.param.watch(lambda event: click(event.new), "click_data")
    buttons = [_save_buttons(name, python), *([_csv(numbers, name)] if numbers is not None else [])]
    tools = pn.Row(*buttons, css_classes=["wb-tools"], margin=(0, 6, 4, 6))
    return pn.Column(
        pane, tools, sizing_mode="stretch_width", css_classes=["wb-figure"], stylesheets=[FIGURE_CSS], margin=(6, 6)
    )


def _save_buttons(name: str, python: str) -> pn.pane.HTML:
    """Return the buttons that save the figure of this name as SVG and PNG, and copy the code that draws it.

    Two of Panel's buttons with their scripts would take the server 12 ms of the 200 ms of a change of selection.
    """
    texts = []
    for suffix, scale in (("svg", 1), ("png", 3)):
        code = _SAVE.replace("NAME", json.dumps(name)).replace("FORMAT_SCALE", str(scale)).replace("FORMAT", suffix)
        texts.append(f'<button type="button" class="wb-save" onclick="{escape(code)}">{suffix.upper()}</button>')
    if python:
        code = escape(_COPY.replace("CODE", json.dumps(python)))
        text = "Copy as Python"
        texts.append(f'<button type="button" class="wb-save" aria-live="polite" onclick="{code}">{text}</button>')
    return pn.pane.HTML("".join(texts), margin=(2, 0), stylesheets=[PARTS_CSS])


def _without_empty_legend(drawn: go.Figure) -> None:
    """Take away the line of the legend, above the foot, from a figure without a legend."""
    entries = [trace for trace in drawn.data if trace.type != "heatmap" and trace.showlegend is not False]
    if entries or drawn.layout.margin.b is not None:
        return
    drawn.update_layout(height=(drawn.layout.height or 480) - LEGEND_HEIGHT, margin={"b": MARGIN_BELOW - LEGEND_HEIGHT})
    for annotation in drawn.layout.annotations:
        if annotation.yshift == 6 - MARGIN_BELOW:  # the foot
            annotation.yshift += LEGEND_HEIGHT


def _csv(rows: Callable[[], pd.DataFrame], name: str) -> pn.widgets.FileDownload:
    return pn.widgets.FileDownload(
        callback=lambda: io.StringIO(csv_text(rows())),
        filename=f"{name}.csv",
        label=_CSV,
        width=126,
        height=28,
        margin=(2, 8),
        variant="outline",
        stylesheets=[TOOL_CSS],
    )


def guarded(body: Callable[[], Any]) -> Any:
    """Return the result of `body` or, if the run is damaged or lacks something, an alert with the reason."""
    try:
        return body()
    except InputError as error:
        return alert(str(error))
    except Exception as error:
        traceback.print_exc()
        text = (
            f"This could not be read ({type(error).__name__}: {str(error)[:200]}). Run `workbench verify "
            "RUN` to list damaged arrays."
        )
        return alert(text, "danger")


def deferred(body: Callable[[], Any]) -> Any:
    """Return the content or, on a page that is not shown yet, a column that is filled once it is; see `later`."""
    return guarded(body) if pn.state.loaded else later(body)


def later(body: Callable[[], Any]) -> pn.Column:
    """Return a column with a loading indicator that is filled after the rest of the page is shown."""
    box = pn.Column(pn.indicators.LoadingSpinner(value=True, size=28), sizing_mode="stretch_width")

    def fill() -> None:
        box[:] = [guarded(body)]

    if pn.state.curdoc is not None and pn.state.loaded:
        pn.state.add_periodic_callback(fill, period=30, count=1)
    else:  # in a notebook nothing is flushed before the cell ends
        when_shown(fill)
    return box


def when_shown(change: Callable[[], Any]) -> None:
    """Change the page now or, if the browser does not show it yet, once it does.

    Panel sends no change to a browser that has fetched a page and not shown it yet (1.9, `hold`), so that what is
    ready in this time would never be seen.
    """
    pn.state.onload(change)


def folded(title: str, body: Callable[[], Any], *, note: str = "") -> pn.Card:
    """Return a collapsed card whose content is created when it is opened."""
    content = pn.Column(sizing_mode="stretch_width")
    box = card(title, content, note=note, collapsed=True)

    def opened(*_: Any) -> None:
        if not box.collapsed and not content.objects:
            content.objects = [guarded(body)]

    box.param.watch(opened, "collapsed")
    return box


def awaited(
    ask: Callable[[], Answer],
    show: Callable[[dict[str, xr.Dataset]], Sequence[Any]],
    *,
    work: str = "Running study",
    failed: str = "This study is not available for this run",
) -> pn.Column:
    """Return a column with the results of a study or, until they are ready, the time it has been running.

    work, failed: the text while it runs, and the text before the reason why there are no results.
    """
    box = pn.Column(sizing_mode="stretch_width")

    def look() -> bool:
        answer = ask()
        if answer.datasets is not None:
            results = answer.datasets
            shown = guarded(lambda: list(show(results)))
            box[:] = shown if isinstance(shown, list) else [shown]
        elif answer.reason:
            box[:] = [unavailable(failed, answer.reason)]
        else:
            text = f"{work} ({answer.seconds:.0f} s). The result will be cached."
            if box and isinstance(box[0], pn.Row):
                box[0][1].object = text
            else:
                box[:] = [pn.Row(pn.indicators.LoadingSpinner(value=True, size=28), html(text))]
            return False
        return True

    if guarded(look) is False:
        watch: Any = None
        failures = 0

        def again() -> None:
            nonlocal failures
            state = guarded(look)
            if state is False:
                failures = 0
                return
            failures += state is not True
            if state is True or failures == _FAILURES:
                watch.stop()
            if failures == _FAILURES:
                box[:] = [state]

        fetched = not pn.state.loaded  # the results may come while the browser fetches the page

        def begin() -> None:
            nonlocal watch
            watch = pn.state.add_periodic_callback(again, period=600)
            if fetched:
                again()

        when_shown(begin)
    return box


def exclude(run: Run, value: str) -> pn.widgets.Select:
    """Return a select widget for the flag of the sequences to leave out, with the number of sequences that have it."""
    counts = Counter(flag for text in run.sequences.get("flags", ()) for flag in str(text).split())
    known = {f"{words} ({counts[flag]:,})": flag for flag, words in SEQUENCE_FLAGS.items() if counts[flag]}
    if value and value not in known.values():
        known[SEQUENCE_FLAGS[value]] = value
    return select("Exclude sequences", {"none": "", **known}, value)


def list_box(name: str, options: Mapping[str, Any], value: Any) -> pn.widgets.Select:
    """Return a list in the sidebar that scrolls to its selected entry; see `workbenchScroll` in page.html."""
    box = select(name, options, value, size=10)
    scroll = "setTimeout(() => window.workbenchScroll && window.workbenchScroll(), 50)"
    box.jscallback(value=scroll, options=scroll)
    return box


def select(name: str, options: Sequence[str] | Mapping[str, Any], value: Any, **more: Any) -> pn.widgets.Select:
    """Return a select widget for the sidebar."""
    return pn.widgets.Select(label=name, options=options, value=value, **({"width": WIDTH} | more))


def wide_select(name: str, options: Mapping[str, Any], value: Any) -> pn.widgets.Select:
    """Return a select widget for the main area, whose options are too long for the sidebar."""
    return select(name, options, value, width=None, max_width=420, sizing_mode="stretch_width")
