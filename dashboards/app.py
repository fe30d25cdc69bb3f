"""The dashboard: Panel wiring around `views`. Everything a page needs comes from this server.

Bootstrap's template, because it is the one of Panel's that asks no other host for a font.
"""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import panel as pn

from workbench.dashboards import views
from workbench.dashboards.state import Shelf, choose
from workbench.errors import InputError

_CSS = """
.bk-root, body { font-family: "DejaVu Sans", system-ui, sans-serif; }
:host(.about) { font-size: 14px; }
"""


def routing_page(shelf: Shelf) -> pn.viewable.Viewable:
    """Expert routing by channel and effort; the selection lives in the address bar."""
    query = {name: values[0].decode() for name, values in (pn.state.session_args or {}).items() if values}
    name = choose(query, {"run": shelf.names, "channel": [], "effort": []}).run
    study = shelf.study("routing", name)
    load = study["load"]
    filled = load["tokens"].values > 0
    channels = [str(c) for c, any_tokens in zip(load["channel"].values, filled.any(1), strict=True) if any_tokens]
    efforts = [str(e) for e in load["effort"].values]
    preferred = sorted(channels, key=lambda c: c not in ("analysis", "final"))
    chosen = choose(query, {"run": shelf.names, "channel": preferred, "effort": efforts[::-1]})

    run = pn.widgets.Select(name="Run", options=shelf.names, value=chosen.run)
    channel = pn.widgets.Select(name="Channel", options=channels, value=chosen.channel)
    effort = pn.widgets.RadioButtonGroup(name="Effort", options=efforts, value=chosen.effort)
    if pn.state.location:
        pn.state.location.sync(channel, {"value": "channel"})
        pn.state.location.sync(effort, {"value": "effort"})
        pn.state.location.sync(run, {"value": "run"})
        run.param.watch(lambda event: setattr(pn.state.location, "reload", True), "value")

    figures = views.routing_figures(study, chosen.channel, chosen.effort)
    heat = pn.pane.Plotly(
        pn.bind(lambda c, e: views.routing_figures(study, c, e)["load"], channel, effort), sizing_mode="stretch_width"
    )
    rest = [pn.pane.Plotly(f, sizing_mode="stretch_width") for n, f in figures.items() if n != "load"]
    opened = shelf.run(name)
    return _template(
        title=f"gpt-oss workbench · {name} · expert routing",
        sidebar=[run, channel, pn.pane.HTML("<label>Effort</label>"), effort],
        main=[
            pn.pane.HTML(views.about(opened), css_classes=["about"], sizing_mode="stretch_width"),
            _titled("Accuracy by effort", pn.widgets.Tabulator(views.accuracy_by_effort(opened), disabled=True, show_index=False)),
            heat,
            *rest,
            pn.Card(pn.pane.Markdown(views.findings(study)), title="What was found", collapsed=True),
            pn.Card(pn.pane.Markdown(views.method(study)), title="How is this computed", collapsed=True),
        ],
    )
