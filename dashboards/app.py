"""The dashboard: Panel wiring around `views`. Everything a page needs comes from this server.

Bootstrap's template, because it is the one of Panel's that asks no other host for a font.
"""

import io
import json
import secrets
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import panel as pn

from workbench.dashboards import views
from workbench.dashboards.state import Selection, Shelf, choose
from workbench.dashboards.transcript import HEIGHT, frame, shown, tokenizer_of
from workbench.errors import InputError

_WIDTH = 235  # of what stands in the side bar
_CSS = "body { font-family: system-ui, 'DejaVu Sans', sans-serif; }"


PAGES = {
    "overview": "Overview", "experts": "Experts", "sinks": "Sinks", "channels": "Analysis and final", "effort": "Effort",
    "transcript": "Transcript", "compare": "Compare",
}  # fmt: skip


def _query() -> dict[str, str]:
    """What the address bar asks for."""
    return {name: values[0].decode() for name, values in (pn.state.session_args or {}).items() if values}


def _pick_run(shelf: Shelf, query: Mapping[str, str]) -> pn.widgets.Select:
    name = query["run"] if query.get("run") in shelf.names else shelf.names[0]
    pick = pn.widgets.Select(name="Run", options=shelf.names, value=name, width=_WIDTH)
    pick.param.watch(lambda event: _remember(run=event.new), "value")
    pick.jscallback(value="setTimeout(() => window.location.reload(), 100)")  # another run is another page
    return pick


def _remember(**chosen: str) -> None:
    """Put a choice into the address bar, so that the link reopens it."""
    if pn.state.location:
        pn.state.location.update_query(**chosen)


def overview_page(shelf: Shelf) -> pn.template.BootstrapTemplate:
    """What the run is, how far it has come, and what it holds."""
    pick_run = _pick_run(shelf, _query())
    name = str(pick_run.value)
    state = pn.pane.HTML(views.progress(shelf.run(name)), sizing_mode="stretch_width")

    def refresh() -> None:
        try:
            state.object = views.progress(shelf.run(name))
        except InputError as error:
            state.object = f"<b>{escape(str(error))}</b>"

    if shelf.run(name).status != "complete":
        pn.state.add_periodic_callback(refresh, period=2000)
    tokens = views.token_counts(shelf.run(name))

    def body() -> pn.Column:
        run, study = shelf.run(name), shelf.costs(name)
        parts: list[Any] = [_table("Tokens by channel and effort", tokens, f"{name}-tokens")]
        if study:
            parts += [
                _plot(views.accuracy(study)),
                _card("What effort brings", _html(views.findings({"g": study["gain"]}))),
            ]
        parts.append(_table("Accuracy and new tokens by effort", views.accuracy_by_effort(run), f"{name}-accuracy"))
        return pn.Column(*parts, sizing_mode="stretch_width")

    about = _html(views.about(shelf.run(name)))
    return _page(
        "overview",
        name,
        [pick_run],
        [about, state, _later(body), _card("Provenance", _html(views.provenance(shelf.run(name))))],
    )


def experts_page(shelf: Shelf) -> pn.template.BootstrapTemplate:
    """Expert routing by channel and effort; the selection lives in the address bar, so that a link reopens it."""
    query = _query()
    pick_run = _pick_run(shelf, query)
    name = str(pick_run.value)
    run, study = shelf.run(name), shelf.study("routing", name)
    options = {"run": shelf.names, **views.filled_cells(study["load"])}
    chosen = choose(query, options)
    pick_channel = pn.widgets.Select(name="Channel", options=options["channel"], value=chosen.channel, width=_WIDTH)
    pick_effort = pn.widgets.RadioButtonGroup(name="Effort", options=options["effort"], value=chosen.effort)
    layers = [str(v) for v in study["load"]["layer"].values]
    pick_layer = pn.widgets.Select(
        name="Layer",
        options=layers,
        value=query.get("layer") if query.get("layer") in layers else layers[0],
        width=_WIDTH,
    )
    experts = [str(v) for v in study["load"]["expert"].values]
    wanted = query.get("expert", "")
    pick_expert = pn.widgets.Select(
        name="Expert", options=experts, value=wanted if wanted in experts else experts[0], width=_WIDTH
    )
    words = tokenizer_of(run.provenance.get("tokenizer", {}).get("digest", ""))
    heat, pairs, one = (pn.Column(sizing_mode="stretch_width") for _ in range(3))

    def show(*_: Any) -> None:
        selection = Selection(str(pick_run.value), pick_channel.value, pick_effort.value)
        # A new pane, not a new figure in the old one: plotly fails when a figure changes while it is being drawn.
        heat[:] = [_plot(views.load(study, selection.channel, selection.effort))]
        if "together" in study:
            layer = int(pick_layer.value)
            follows = views.transitions(study, selection.channel, layer)
            pairs[:] = [_plot(f) for f in (views.pairs(study, selection.channel, layer), follows) if f is not None]
        show_expert()
        _remember(channel=selection.channel, effort=selection.effort, layer=pick_layer.value, expert=pick_expert.value)

    def show_expert() -> None:
        layer, expert, channel = int(pick_layer.value), int(pick_expert.value), pick_channel.value
        name_ = f"{name}-layer-{layer}-expert-{expert}"
        cards = [
            _table(
                "Where it acts: its load over an even share", views.where_it_acts(study, layer, expert), f"{name_}-load"
            )
        ]
        if "together" in study:
            cards.append(
                _table(
                    f"Whom it works with, in {channel}", views.partners(study, channel, layer, expert), f"{name_}-with"
                )
            )
        if "routing" in run.recorded:
            tokens = _later(
                lambda: _table(
                    "Its tokens", views.top_tokens(run, layer, expert, lambda i: shown(i, words)), f"{name_}-tokens"
                )
            )
            cards.append(tokens)
        one[:] = [pn.pane.Markdown(f"## Layer {layer}, expert {expert}"), *cards]

    show()
    for widget in (pick_channel, pick_effort, pick_layer, pick_expert):
        widget.param.watch(show, "value")
    return _page(
        "experts", name, [pick_run, pick_channel, pn.pane.HTML("<label>Effort</label>"), pick_effort, pick_layer, pick_expert],
        [
            _html(views.about(run)),
            heat,
            one,
            pairs,
            *map(_plot, views.fixed_figures(study)),
            _card("What was found", _html(views.findings(study))),
            _card("How is this computed", _html(views.method(study))),
        ],
    )  # fmt: skip


def study_page(shelf: Shelf, page: str) -> pn.template.BootstrapTemplate:
    """A study's figures, one at a time, with the numbers behind it and what was found."""
    query = _query()
    pick_run = _pick_run(shelf, query)
    name = str(pick_run.value)
    figures, tables = shelf.gallery(page, name)
    study = shelf.study(page, name)
    labels = views.figure_names(figures)
    first = next((label for label, key in labels.items() if key == query.get("figure")), next(iter(labels)))
    pick = pn.widgets.Select(name="Figure", options=list(labels), value=first, size=min(24, len(labels)), width=_WIDTH)
    shown = pn.Column(sizing_mode="stretch_width")

    def show(*_: Any) -> None:
        key = labels[str(pick.value)]
        shown[:] = [_plot(figures[key]), _download(tables[key], f"{name}-{page}-{key}")]
        _remember(figure=key)

    show()
    pick.param.watch(show, "value")
    main = [
        shown,
        _card("What was found", _html(views.findings(study))),
        _card("How is this computed", _html(views.method(study))),
    ]
    return _page(page, name, [pick_run, pick], main)


def compare_page(shelf: Shelf) -> pn.template.BootstrapTemplate:
    """Two runs on the same transcripts."""
    query = _query()
    pick_run = _pick_run(shelf, query)
    name = str(pick_run.value)
    others = [other for other in shelf.names if other != name]
    if not others:
        text = "Start the dashboard with two runs of the same transcripts: workbench dashboard A.zarr B.zarr"
        return _page("compare", name, [pick_run], [pn.pane.Alert(text, alert_type="info")])
    pick = pn.widgets.Select(
        name="With", options=others, value=query["with"] if query.get("with") in others else others[0], width=_WIDTH
    )
    shown = pn.Column(sizing_mode="stretch_width")

    def show(*_: Any) -> None:
        other = str(pick.value)
        _remember(**{"with": other})
        try:
            study = shelf.comparison(name, other)
        except InputError as error:
            shown[:] = [pn.pane.Alert(escape(str(error)), alert_type="warning")]
            return
        side = [_html(f"<b>{escape(n)}</b> {views.about(shelf.run(n))}") for n in (name, other)]
        parts = [_plot(figure) for figure in views.comparison(study)]
        shown[:] = [
            *side,
            *parts,
            _card("What was found", _html(views.findings(study))),
            _card("How is this computed", _html(views.method(study))),
        ]

    show()
    pick.param.watch(show, "value")
    return _page("compare", name, [pick_run, pick], [shown])


def transcript_page(shelf: Shelf) -> pn.template.BootstrapTemplate:
    """One conversation, its tokens coloured by what was recorded, replayed token by token."""
    query = _query()
    pick_run = _pick_run(shelf, query)
    name = str(pick_run.value)
    run = shelf.run(name)
    words = tokenizer_of(run.provenance.get("tokenizer", {}).get("digest", ""))
    table = run.sequences
    if table.empty:
        raise InputError("the run holds no conversation yet")
    task = pn.widgets.Select(name="Task", options=["all", *sorted(set(table["task"]) - {""})], width=_WIDTH)
    effort = pn.widgets.Select(name="Effort", options=["all", *views.efforts(run)], width=_WIDTH)
    find = pn.widgets.TextInput(name="Id or answer contains", width=_WIDTH)
    pick = pn.widgets.Select(name="Conversation", options=[], size=12, width=_WIDTH)
    before, after = (pn.widgets.Button(name=text, width=_WIDTH // 2 - 8) for text in ("‹ previous", "next ›"))
    shown = pn.Column(sizing_mode="stretch_width")
    effort.value = effort.options[-1]
    if query.get("task") in task.options:
        task.value = query["task"]

    def fill(*_: Any) -> None:
        found = views.conversations(run, task.value, effort.value, find.value)
        pick.options = found
        wanted = query.get("sequence", "")
        if pick.value not in found.values():
            pick.value = next((v for v in found.values() if str(v) == wanted), next(iter(found.values()), None))

    def show(*_: Any) -> None:
        if pick.value is None:
            shown[:] = [pn.pane.Alert("no conversation is like that", alert_type="info")]
            return
        _remember(sequence=str(pick.value), task=str(task.value))
        shown[:] = [
            _html(views.about_sequence(run, int(pick.value))),
            pn.pane.HTML(frame(run, int(pick.value), words), height=HEIGHT + 10, sizing_mode="stretch_width"),
        ]

    def step(by: int) -> None:
        values = list(pick.options.values())
        if values:
            pick.value = values[(values.index(pick.value) + by) % len(values)]

    fill()
    show()
    for widget in (task, effort, find):
        widget.param.watch(fill, "value")
    pick.param.watch(show, "value")
    before.on_click(lambda _: step(-1))
    after.on_click(lambda _: step(1))
    return _page("transcript", name, [pick_run, task, effort, find, pick, pn.Row(before, after)], [shown])


def _html(text: str) -> pn.pane.HTML:
    return pn.pane.HTML(text, sizing_mode="stretch_width")


def _later(body: Callable[[], Any]) -> pn.viewable.Viewable:
    """Made once the page is there, with a sign that it is on its way; a failure is said in its place."""

    def guarded() -> Any:
        try:
            return body()
        except InputError as error:
            return pn.pane.Alert(escape(str(error)), alert_type="warning")

    return pn.panel(guarded, defer_load=True, loading_indicator=True, sizing_mode="stretch_width")


def _download(table: pd.DataFrame, name: str) -> pn.widgets.FileDownload:
    return pn.widgets.FileDownload(
        callback=lambda: io.StringIO(table.to_csv(index=False)),
        filename=f"{name}.csv",
        label="numbers as CSV",
        width=160,
    )


def _table(title: str, table: pd.DataFrame, name: str) -> pn.Card:
    return pn.Card(
        pn.pane.DataFrame(table, index=False), _download(table, name), title=title, sizing_mode="stretch_width"
    )


def _plot(figure: Any) -> pn.pane.Plotly:
    # plotly offers to upload a chart unless it is told not to; its camera gives an SVG that a paper can use
    config = {"showSendToCloud": False, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}
    return pn.pane.Plotly(figure, sizing_mode="stretch_width", config=config)


def _card(title: str, content: pn.viewable.Viewable) -> pn.Card:
    return pn.Card(content, title=title, sizing_mode="stretch_width", collapsed=title.startswith("How"))


def _page(page: str, name: str, sidebar: list[Any], main: list[Any]) -> pn.template.BootstrapTemplate:
    links = "".join(
        f'<a href="./{path}?run={quote(name)}" style="display:block;padding:.15rem 0;{"font-weight:700" if path == page else ""}">{title}</a>'
        for path, title in PAGES.items()
    )
    return pn.template.BootstrapTemplate(
        site="gpt-oss workbench", title=f"{name}: {PAGES.get(page, page).lower()}" if name else page,
        sidebar=[pn.pane.HTML(f"<nav>{links}</nav>", width=_WIDTH), *sidebar], main=main, sidebar_width=275, raw_css=[_CSS],
    )  # fmt: skip


def _or_reason(page: Callable[[], pn.template.BootstrapTemplate]) -> Callable[[], pn.template.BootstrapTemplate]:
    """The page, or what is the matter with the run: never a blank page."""

    def show() -> pn.template.BootstrapTemplate:  # a plain function: Panel shows any other callable as an object
        try:
            return page()
        except InputError as error:
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}; the server's log has the details"
        return _page("this run cannot be shown", "", [], [pn.pane.Alert(escape(reason), alert_type="danger")])

    return show


def pages(shelf: Shelf) -> dict[str, Callable[[], pn.template.BootstrapTemplate]]:
    """Path → page; the overview is also what an address without a path opens."""
    made: dict[str, Callable[[], pn.template.BootstrapTemplate]] = {
        "overview": partial(overview_page, shelf), "experts": partial(experts_page, shelf), "compare": partial(compare_page, shelf),
        "transcript": partial(transcript_page, shelf), **{p: partial(study_page, shelf, p) for p in ("sinks", "channels", "effort")},
    }  # fmt: skip
    return {path: _or_reason(made["overview" if path == "/" else path]) for path in ("/", *PAGES)}


def serve(
    runs: Sequence[str | Path], *, port: int = 5006, address: str = "localhost", show: bool = False,
    allow_origin: Sequence[str] = (), basic_auth: Path | None = None,
) -> None:  # fmt: skip
    """Serve the dashboard until interrupted. Only pages from `address`, and of the origins allowed, may connect.

    basic_auth: a JSON file of names and passwords; without it everybody who reaches the address may look.
    """
    access = _access(basic_auth)
    shelf = Shelf(runs)
    _check_free(address, port)
    pn.extension("plotly", notifications=False)
    print(f"http://{address}:{port}/  (Ctrl-C ends)", flush=True)
    threading.Thread(
        target=shelf.study, args=("routing", shelf.names[0]), daemon=True
    ).start()  # ready for the first visit
    pn.serve(
        pages(shelf),
        address=address, port=port, show=show, verbose=False, title="gpt-oss workbench", websocket_origin=[*_origins(address, port), *allow_origin], **access,
        num_threads=4,
    )  # fmt: skip


def _access(basic_auth: Path | None) -> dict[str, Any]:
    """What Panel is told of who may enter; the file stays where it is, and the cookie's key is of this process alone."""
    if basic_auth is None:
        return {}
    try:
        known = json.loads(basic_auth.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--basic-auth {basic_auth}: wanted a JSON object of names and passwords ({error})") from error
    if not isinstance(known, dict) or not known or not all(isinstance(v, str) and v for v in known.values()):
        raise InputError(f"--basic-auth {basic_auth}: wanted a JSON object of names and passwords")
    return {"basic_auth": str(basic_auth), "cookie_secret": secrets.token_hex(32)}


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
