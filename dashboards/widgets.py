"""Pieces that pages are made of: figures that can be taken away, tables, texts, and what comes later."""

import io
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import panel as pn
import plotly.graph_objects as go
import xarray as xr

from workbench.dashboards.study_jobs import Answer
from workbench.errors import InputError

WIDTH = 235  # of what stands in the side bar
_SAVE = """
const found = [];
const walk = root => { for (const e of root.querySelectorAll('*')) {
  if (e.classList.contains('js-plotly-plot') && e.layout && e.layout.meta === NAME) found.push(e);
  if (e.shadowRoot) walk(e.shadowRoot); } };
walk(document);
if (found.length) window.Plotly.downloadImage(found[0],
  {format: 'FORMAT', filename: NAME, width: 920, height: found[0].layout.height || 500, scale: FORMAT_SCALE});
"""
_TABLE = """
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: .18rem .9rem .18rem 0; border-bottom: 1px solid #8884; white-space: pre-wrap; }
"""


def html(text: str) -> pn.pane.HTML:
    """Markup of our own, what came from outside escaped by whoever made it."""
    return pn.pane.HTML(text, sizing_mode="stretch_width")


def alert(text: str, kind: str = "warning") -> pn.pane.Alert:
    """A plain sentence in a box."""
    return pn.pane.Alert(escape(text), alert_type=kind)


def card(title: str, content: pn.viewable.Viewable, *, collapsed: bool = False) -> pn.Card:
    """A titled box that can be folded."""
    return pn.Card(content, title=title, sizing_mode="stretch_width", collapsed=collapsed)


def beside(*pieces: pn.viewable.Viewable) -> pn.FlexBox:
    """Pieces in a row where the window is wide enough, else one below the other."""
    for piece in pieces:
        piece.styles = {"flex": "1 1 400px", "width": "auto"}
    return pn.FlexBox(*pieces, flex_wrap="wrap", align_items="flex-start", gap="8px", sizing_mode="stretch_width")


def table(title: str, rows: pd.DataFrame, name: str) -> pn.Card:
    """A table and its file."""
    markup = rows.rename_axis(columns=None).to_html(
        index=False, escape=True, border=0, na_rep="–", formatters=_formats(rows)
    )
    words = (i for i, column in enumerate(rows.columns, 1) if rows[column].dtype.kind not in "biuf")
    left = "".join(f"td:nth-child({i}), th:nth-child({i}) {{ text-align: left; }}\n" for i in words)
    shown = html(f"<style>{_TABLE}{left}</style><div style='overflow-x:auto'>{markup}</div>")
    return card(title, pn.Column(shown, _csv(lambda: rows, name), sizing_mode="stretch_width"))


def _formats(rows: pd.DataFrame) -> dict[str, Callable[[Any], str]]:
    whole = [str(c) for c in rows.columns if rows[c].dtype.kind in "iu"]
    return {column: "{:,}".format for column in whole}


def figure(drawn: go.Figure, name: str, numbers: Callable[[], pd.DataFrame] | None = None, **more: Any) -> pn.Column:
    """A figure that can be saved as SVG, PNG and, where there are numbers, CSV. more: for the pane (`click` …)."""
    drawn.update_layout(meta=name, width=None)
    # plotly offers to upload a chart unless it is told not to
    config = {"showSendToCloud": False, "displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["toImage"]}
    pane = pn.pane.Plotly(drawn, sizing_mode="stretch_width", config=config)
    if click := more.get("click"):
        pane.param.watch(lambda event: click(event.new), "click_data")
    buttons: list[Any] = []
    for suffix, scale in (("svg", 1), ("png", 3)):
        button = pn.widgets.Button(label=suffix.upper(), width=70, variant="outline")
        code = _SAVE.replace("NAME", json.dumps(name)).replace("FORMAT_SCALE", str(scale)).replace("FORMAT", suffix)
        button.js_on_click(code=code)
        buttons.append(button)
    if numbers is not None:
        buttons.append(_csv(numbers, name))
    return pn.Column(pane, pn.Row(*buttons), sizing_mode="stretch_width")


def _csv(rows: Callable[[], pd.DataFrame], name: str) -> pn.widgets.FileDownload:
    return pn.widgets.FileDownload(
        callback=lambda: io.StringIO(rows().to_csv(index=False)), filename=f"{name}.csv", label="numbers as CSV", width=160,
        variant="outline",
    )  # fmt: skip


def guarded(body: Callable[[], Any]) -> Any:
    """What the body makes or, where a run is damaged or lacks something, what is the matter."""
    try:
        return body()
    except InputError as error:
        return alert(str(error))
    except Exception as error:
        traceback.print_exc()
        text = f"this could not be read ({type(error).__name__}: {str(error)[:200]}); `workbench verify RUN` says what is damaged"
        return alert(text, "danger")


def later(body: Callable[[], Any]) -> pn.Column:
    """Made once everything else is on the page, with a sign that it is on its way."""
    box = pn.Column(pn.indicators.LoadingSpinner(value=True, size=28), sizing_mode="stretch_width")

    def fill() -> None:
        box[:] = [guarded(body)]

    if pn.state.curdoc is None:  # in a notebook nothing is flushed before the cell ends
        fill()
    else:
        pn.state.add_periodic_callback(fill, period=30, count=1)
    return box


def folded(title: str, body: Callable[[], Any]) -> pn.Card:
    """A box that is closed at first; what is in it is made when somebody opens it."""
    box = card(title, pn.Column(sizing_mode="stretch_width"), collapsed=True)

    def opened(*_: Any) -> None:
        if not box.collapsed and not box[0].objects:
            box[0].objects = [guarded(body)]

    box.param.watch(opened, "collapsed")
    return box


def awaited(ask: Callable[[], Answer], show: Callable[[dict[str, xr.Dataset]], Sequence[Any]]) -> pn.Column:
    """What a study shows once it is made; until then, how long it has been at work."""
    box = pn.Column(sizing_mode="stretch_width")

    def look() -> bool:
        answer = ask()
        if answer.datasets is not None:
            found = answer.datasets
            shown = guarded(lambda: list(show(found)))
            box[:] = shown if isinstance(shown, list) else [shown]
        elif answer.reason:
            box[:] = [alert(f"There is no such study of this run: {answer.reason}")]
        else:
            said = f"The study with intervals and controls is being made: {answer.seconds:.0f} s so far. It is kept."
            if box and isinstance(box[0], pn.Row):
                box[0][1].object = said
            else:
                box[:] = [pn.Row(pn.indicators.LoadingSpinner(value=True, size=28), html(said))]
            return False
        return True

    if guarded(look) is False:
        watch: Any = None

        def again() -> None:
            if guarded(look) is not False and watch is not None:
                watch.stop()

        watch = pn.state.add_periodic_callback(again, period=600)
    return box


def select(name: str, options: Sequence[str] | Mapping[str, Any], value: Any, **more: Any) -> pn.widgets.Select:
    """A choice in the side bar."""
    return pn.widgets.Select(label=name, options=options, value=value, **({"width": WIDTH} | more))
