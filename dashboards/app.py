"""The dashboard: Panel wiring around `views`. Everything a page needs comes from this server.

Bootstrap's template, because it is the one of Panel's that asks no other host for a font.
"""

import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import panel as pn

from workbench.dashboards import views
from workbench.dashboards.state import Selection, Shelf, choose
from workbench.errors import InputError

_WIDTH = 190  # of what stands in the side bar
_CSS = "body { font-family: system-ui, 'DejaVu Sans', sans-serif; }"


def routing_page(shelf: Shelf) -> pn.template.BootstrapTemplate:
    """Expert routing by channel and effort; the selection lives in the address bar, so that a link reopens it."""
    query = {name: values[0].decode() for name, values in (pn.state.session_args or {}).items() if values}
    name = query["run"] if query.get("run") in shelf.names else shelf.names[0]
    run, study = shelf.run(name), shelf.study("routing", name)
    options = {"run": shelf.names, **views.filled_cells(study["load"])}
    chosen = choose(query, options)

    pick_run = pn.widgets.Select(name="Run", options=options["run"], value=chosen.run, width=_WIDTH)
    pick_channel = pn.widgets.Select(name="Channel", options=options["channel"], value=chosen.channel, width=_WIDTH)
    pick_effort = pn.widgets.RadioButtonGroup(name="Effort", options=options["effort"], value=chosen.effort)
    heat = pn.Column(sizing_mode="stretch_width")

    def show(*_: Any) -> None:
        selection = Selection(pick_run.value, pick_channel.value, pick_effort.value)
        # A new pane, not a new figure in the old one: plotly fails when a figure changes while it is being drawn.
        heat[:] = [_plot(views.load(study, selection.channel, selection.effort))]
        if pn.state.location:
            pn.state.location.update_query(**selection.query())

    show()
    for widget in (pick_channel, pick_effort, pick_run):
        widget.param.watch(show, "value")
    pick_run.jscallback(value="setTimeout(() => window.location.reload(), 100)")  # another run is another page

    return _page(
        title=f"{name}: expert routing",
        sidebar=[pick_run, pick_channel, pn.pane.HTML("<label>Effort</label>"), pick_effort],
        main=[
            pn.pane.HTML(views.about(run), sizing_mode="stretch_width"),
            heat,
            *map(_plot, views.fixed_figures(study)),
            _card("Accuracy and tokens by effort", pn.pane.DataFrame(views.accuracy_by_effort(run), index=False)),
            _card("What was found", pn.pane.HTML(views.findings(study), sizing_mode="stretch_width")),
            _card("How is this computed", pn.pane.HTML(views.method(study), sizing_mode="stretch_width")),
        ],
    )


def _plot(figure: Any) -> pn.pane.Plotly:
    # plotly offers to upload a chart unless it is told not to
    return pn.pane.Plotly(figure, sizing_mode="stretch_width", config={"showSendToCloud": False, "displaylogo": False})


def _card(title: str, content: pn.viewable.Viewable) -> pn.Card:
    return pn.Card(content, title=title, sizing_mode="stretch_width", collapsed=title.startswith("How"))


def _page(title: str, sidebar: list[Any], main: list[Any]) -> pn.template.BootstrapTemplate:
    return pn.template.BootstrapTemplate(
        site="gpt-oss workbench", title=title, sidebar=sidebar, main=main, sidebar_width=230, raw_css=[_CSS]
    )


def _or_reason(page: Callable[[Shelf], pn.template.BootstrapTemplate], shelf: Shelf) -> pn.template.BootstrapTemplate:
    """The page, or what is the matter with the run: never a blank page."""
    try:
        return page(shelf)
    except InputError as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}; the server's log has the details"
    return _page("this run cannot be shown", [], [pn.pane.Alert(escape(reason), alert_type="danger")])


def serve(runs: Sequence[str | Path], *, port: int = 5006, address: str = "localhost", show: bool = False) -> None:
    """Serve the dashboard until interrupted. Only pages from `address` may connect."""
    shelf = Shelf(runs)
    _check_free(address, port)
    pn.extension("plotly", notifications=False)
    print(f"http://{address}:{port}/  (Ctrl-C ends)", flush=True)
    threading.Thread(
        target=shelf.study, args=("routing", shelf.names[0]), daemon=True
    ).start()  # ready for the first visit
    pn.serve(
        {"/": lambda: _or_reason(routing_page, shelf)},
        address=address, port=port, show=show, verbose=False, title="gpt-oss workbench", websocket_origin=_origins(address, port),
        num_threads=4,
    )  # fmt: skip


def _origins(address: str, port: int) -> list[str]:
    names = {address, "localhost", "127.0.0.1"} if address in ("localhost", "127.0.0.1") else {address}
    return [f"{name}:{port}" for name in sorted(names)]


def _check_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise InputError(
                f"port {port} of {address} cannot be used ({error.strerror}): choose another with --port"
            ) from error
