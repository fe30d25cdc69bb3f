"""Serve the dashboard by a command, by `panel serve`, or in a notebook. The pages are in `pages`.

Everything a page needs comes from this server. The frame of a page is in `layout`, its look in `theme`, and who may
connect in `server`.
"""

import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import panel as pn

from workbench.dashboards import content, widgets
from workbench.dashboards.layout import PageTemplate, missing_page, page_template
from workbench.dashboards.pages import FIGURE_FIRST, absent_pages, made, page_titles
from workbench.dashboards.server import LOCAL, checked_address, listen
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.figures import quick_look as draw
from workbench.runs import Run
from workbench.studies import quick_look


class ExtraPage(NamedTuple):
    """A page of another package beside those of runs.

    show: makes it, given the titles of all pages by address, and the addresses of those without records.
    """

    title: str
    show: Callable[[Mapping[str, str], Collection[str]], PageTemplate]


def _asked() -> dict[str, str]:
    """Return what the address of this visit asks for."""
    given = pn.state.session_args or {}
    return {name: values[0].decode("utf-8", "replace") for name, values in given.items() if values}


def _template(
    registry: RunRegistry, page: str, *, one_path: bool = False, titles: Mapping[str, str] | None = None
) -> PageTemplate:
    """Return a page in its frame. one_path: all pages have the same path, and the query names the page.

    titles: of all pages by address, where there are more than those of runs.
    """
    choice = Selection(_asked())

    def address_query() -> str:
        return urlencode(({"page": page} if one_path else {}) | choice.values)

    def remember() -> None:
        if pn.state.location:
            pn.state.location.search = "?" + address_query()

    address = "?page={}&{}".format if one_path else "./{}?{}".format
    session = Session(registry, choice, remember, address)
    pick = widgets.select("Run", registry.names, session.name, visible=len(registry.names) > 1)
    pick.param.watch(lambda event: session.put(run=str(event.new), sequence=""), "value")
    pick.jscallback(value="setTimeout(() => window.location.reload(), 150)")  # another run is another page
    exclude = widgets.exclude(session.registry.run(session.name), session.exclude)
    exclude.param.watch(lambda event: session.put(exclude=str(event.new)), "value")
    exclude.jscallback(value="setTimeout(() => window.location.reload(), 150)")
    shown = made(page, session)
    return page_template(
        page,
        titles or page_titles(),
        session.name,
        sidebar=[pick, *shown.sidebar, exclude],
        main=shown.main,
        query=address_query(),
        theme=session.theme,
        one_path=one_path,
        absent=absent_pages(session),
        figure_first=page in FIGURE_FIRST,
    )


def pages(registry: RunRegistry, extra: Mapping[str, ExtraPage] | None = None) -> dict[str, Callable[[], PageTemplate]]:
    """Return path → page; an address without a path opens the overview, too. extra: more pages by their path."""
    more = extra or {}
    titles = all_titles(more)

    def of(page: str) -> Callable[[], PageTemplate]:
        def show() -> PageTemplate:  # a plain function: Panel shows any other callable as an object
            if page not in more:
                return _template(registry, page, titles=titles)
            return more[page].show(titles, absent_pages(Session(registry, Selection(_asked()), lambda: None)))

        return show

    return {"/": of("overview"), **{page: of(page) for page in titles}}


def all_titles(extra: Mapping[str, ExtraPage]) -> dict[str, str]:
    """Return the title of every page by its path."""
    return page_titles() | {path: page.title for path, page in extra.items()}


def servable(paths: Sequence[str | Path]) -> PageTemplate:
    """Return the whole dashboard as one address, its page in the query: for `panel serve`.

    panel serve workbench/dashboards/app.py --args RUN.zarr
    """
    registry = pn.state.as_cached("workbench-registry", lambda: RunRegistry(paths))
    asked = _asked().get("page", "overview")
    page = asked if asked in page_titles() else "overview"
    return _template(registry, page, one_path=True).servable()


def notebook(*paths: str | Path, page: str = "overview", **chosen: str) -> pn.Column:
    """Return the dashboard for a notebook cell: `notebook("run.zarr", page="experts", channel="final")`.

    Raises:
        InputError: no page has this name.
    """
    if page not in page_titles():
        raise InputError(f"page {page!r} does not exist; the pages are {', '.join(page_titles())}")
    _load_widgets()
    registry, choice = RunRegistry(paths), Selection(chosen)
    body = pn.Column(sizing_mode="stretch_width")
    titles = {title: path for path, title in page_titles().items()}
    pick = widgets.select("Page", titles, page)  # buttons of all pages would be wider than a cell
    runs = widgets.select("Run", registry.names, choice.get("run", registry.names))

    def show(*_: Any) -> None:
        choice.put(run=str(runs.value))
        shown = made(str(pick.value), Session(registry, choice, lambda: None))
        side = pn.Column(*([runs] if len(registry.names) > 1 else []), *shown.sidebar, width=widgets.WIDTH + 20)
        body[:] = [pn.Row(side, pn.Column(*shown.main, sizing_mode="stretch_width"), sizing_mode="stretch_width")]

    show()
    for widget in (pick, runs):
        widget.param.watch(show, "value")
    return pn.Column(pick, body, sizing_mode="stretch_width")


def serve(
    runs: Sequence[str | Path],
    *,
    port: int = 5006,
    address: str = "localhost",
    show: bool = False,
    allow_origin: Sequence[str] = (),
    basic_auth: Path | None = None,
    model: str = "",
    autoencoders: Mapping[str, Path] | None = None,
    extra: Mapping[str, ExtraPage] | None = None,
) -> None:
    """Serve the dashboard until interrupted. Only pages from `address`, and of the origins allowed, may connect.

    basic_auth: a JSON file of names and passwords; without it everybody who reaches the address may look. model: the
    one that the runs were captured from, for attention patterns; loaded by processes of their own when it is needed.
    autoencoders: folders by the digest that a capture records, for ablations of their features.
    extra: pages of other packages by their path.
    """
    registry = RunRegistry(runs, model=model, autoencoders=autoencoders, editable=address in LOCAL)
    at = checked_address(address, port, allow_origin, basic_auth)
    _load_widgets()
    threading.Thread(target=_warm, args=(registry,), daemon=True).start()
    try:
        listen(pages(registry, extra), at, show=show, missing_page=missing_page(all_titles(extra or {})))
    finally:
        registry.jobs.close()


def _load_widgets() -> None:
    """Let Panel load plotly and tables with each page, from this server only."""
    pn.extension("plotly", "tabulator", notifications=False, inline=True)


def _warm(registry: RunRegistry) -> None:
    """Read what the first visitor would wait for: tables, sums, and the modules that draw figures."""
    for name in registry.names:
        run = registry.run(name)
        if run.status != "complete":  # it is opened again for each visitor
            continue
        widgets.guarded(partial(registry.read_stored_studies, name))
        widgets.guarded(registry.ask_costs(name) if not registry.is_large(name) else partial(quick_look.tokens, run))
        widgets.guarded(partial(content.tokens_by_role, run))
        if "routing" in run.recorded:
            widgets.guarded(partial(registry.pairs, name))
            widgets.guarded(partial(_draw_load, run))
        if {"sinks", "sink_sums"} & set(run.recorded):
            widgets.guarded(partial(quick_look.sinks, run))


def _draw_load(run: Run) -> None:
    draw.heatmap(quick_look.routing(run), "relative")


if __name__.startswith("bokeh_app"):  # what `panel serve` calls a script
    _load_widgets()
    servable(sys.argv[1:])
