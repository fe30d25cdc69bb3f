"""The pages of the dashboard: which content each page shows, and which selection changes it.

Sums are shown immediately. Studies are computed in a separate process and shown when they are ready (see `study_jobs`).
"""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import numpy as np
import panel as pn
import xarray as xr

from workbench import registry
from workbench.dashboards import content, python_code, widgets
from workbench.dashboards.attention_page import attention
from workbench.dashboards.conversation_page import transcript
from workbench.dashboards.expert_sections import expert_gallery
from workbench.dashboards.features_page import features
from workbench.dashboards.features_page import names as feature_names
from workbench.dashboards.graph_page import graph
from workbench.dashboards.heatmap_pages import experts, sinks
from workbench.dashboards.neurons_page import neurons
from workbench.dashboards.overview import overview
from workbench.dashboards.partner_runs import chosen_partner, partners, sentence
from workbench.dashboards.results_pages import causal
from workbench.dashboards.session import Page, Selectors, Session, box, missing_record, study
from workbench.errors import InputError
from workbench.figures import effort as draw_effort
from workbench.figures import quick_look as draw
from workbench.studies import quick_look


def channels(session: Session) -> Page:
    """Return the page that compares the analysis and final channels: tested differences, then sums of a selection.

    The difference of the sums is not drawn: final has tasks and efforts without analysis, so that its sign may be that
    of a task. The study compares the channels within prompts.
    """
    run, name = session.run, session.name
    chosen = Selectors(session, "effort", "task")
    raw = box()

    def show() -> None:
        cell = {"effort": chosen["effort"], "task": chosen["task"]}

        def body(kind: Callable[..., xr.Dataset], measure: draw.Measure) -> Any:
            of_channels = {channel: kind(run, channel=channel, **cell) for channel in ("analysis", "final")}
            # one colour scale for both; loads have the same in any case
            top = 100 * max(float(np.nanmax(ds[measure].values, initial=0.001)) for ds in of_channels.values())

            def code(channel: str) -> str:
                selected = {"channel": channel, **cell}
                return python_code.selection_heatmap(
                    run, kind.__name__, measure, selected, session.exclude, session.theme, top=top
                )

            return widgets.beside(
                *(
                    widgets.figure(
                        draw.heatmap(ds, measure, top=top, theme=session.theme),
                        f"{name}-{channel}-{measure}",
                        lambda ds=ds: ds.to_dataframe().reset_index(),  # type: ignore[misc]
                        python=code(channel),
                    )
                    for channel, ds in of_channels.items()
                )
            )

        raw[:] = [
            *([widgets.deferred(lambda: body(quick_look.routing, "load"))] if "routing" in run.recorded else []),
            *(
                [widgets.deferred(lambda: body(quick_look.sinks, "mass"))]
                if {"sinks", "sink_sums"} & set(run.recorded)
                else []
            ),
        ]

    chosen.watch(show, "effort", "task")
    tested = study(session, "channels", heading="Tested differences", first=True)
    title = widgets.html(
        "<h2>Load and sinks by channel</h2><p class='wb-under'>Pooled over all tokens of the selected effort and task, "
        "not tested</p>"
    )
    return Page(chosen.sidebar(), [widgets.html(content.about(run)), *tested, title, raw])


def effort(session: Session) -> Page:
    """Return the page of reasoning effort: accuracy and tokens by task, then the study at equal position."""
    run, name = session.run, session.name
    efforts = session.registry.efforts(name, session.exclude)
    if len(efforts) < 2:
        known = f"all transcripts of {name} have the effort {efforts[0]}" if efforts else f"{name} names none"
        text = f"This page compares at least two, and {known}. "
        text += "Generate answers to the same prompts at every effort, and capture them:"
        command = "workbench generate MODEL PROMPTS.jsonl ANSWERS.jsonl --effort low --effort medium --effort high"
        return Page(
            [], [widgets.html(content.about(run)), widgets.empty_state("Fewer than two efforts", text, command)]
        )
    chosen = Selectors(session, "task")
    curve = box()

    def show() -> None:
        def body(costs: Mapping[str, xr.Dataset]) -> list[Any]:
            cost, task = costs["cost"], chosen["task"]
            drawn = draw_effort.accuracy_by_tokens(cost, task, theme=session.theme)
            rows = cost.sel(task=task).to_dataframe().reset_index()
            return [
                widgets.figure(
                    drawn,
                    f"{name}-accuracy_by_tokens-{task}",
                    lambda: rows,
                    python=python_code.accuracy_figure(run, task, session.exclude, session.theme),
                ),
                widgets.card(
                    "Gain by effort step",
                    widgets.html(content.gains(costs["gain"], task)),
                    note="Differences paired by prompt; square brackets: 95 % intervals",
                ),
            ]

        curve[:] = [widgets.awaited(session.registry.ask_costs(name, session.exclude), body)]

    chosen.watch(show, "task")
    return Page(
        chosen.sidebar(),
        [widgets.html(content.about(run)), curve, *study(session, "effort", above=["accuracy_by_tokens"])],
    )


def compare(session: Session) -> Page:
    """Return the page that compares two runs of the same transcripts: tested differences, then either run's load."""
    name = session.name
    listed = partners(session)
    first = chosen_partner(session, listed)
    if first is None:
        text = "Start the dashboard with two runs of the same transcripts, as of two models:"
        return Page([], [widgets.empty_state("One run", text, f"workbench dashboard {name}.zarr OTHER.zarr")])
    chosen = Selectors(session, "channel", "effort", "task")
    by_name = {one.name: one for one in listed}
    pick = widgets.select("With", list(by_name), first.name)
    about, shown, tested = box(), box(), box()

    def show() -> None:
        other = str(pick.value)

        def body() -> Any:
            runs = [session.run, session.other_run(other)]
            sets = [quick_look.routing(run, **chosen.cell) for run in runs]
            for ds, label in zip(sets, (name, other), strict=True):
                ds.attrs["title"] = f"{label}, {ds.attrs['title']}"
            drawn = [
                widgets.figure(
                    draw.heatmap(ds, "load", theme=session.theme),
                    f"{name}-{other}-{i}",
                    lambda ds=ds: ds.to_dataframe().reset_index(),  # type: ignore[misc]
                )
                for i, ds in enumerate(sets)
            ]
            about[:] = [
                widgets.html(f"<p class='wb-first'>{escape(sentence(by_name[other], listed))}</p>"),
                *(
                    widgets.html(f"<b>Run {letter}: {escape(n)}</b> {content.about(r)}")
                    for letter, n, r in zip("ab", (name, other), runs, strict=True)
                ),
            ]
            title = "<h2>Expert load of both runs</h2><p class='wb-under'>Pooled over all tokens of the selected "
            title += "channel, effort and task, not tested</p>"
            return pn.Column(widgets.html(title), *drawn, sizing_mode="stretch_width")

        shown[:] = [widgets.guarded(body)]

    def another(*_: Any) -> None:
        session.put(**{"with": str(pick.value)})
        show()
        tested[:] = study(session, "compare", name, str(pick.value), first=True)

    chosen.watch(show, "channel", "effort", "task")
    pick.param.watch(another, "value")
    tested[:] = study(session, "compare", name, str(pick.value), first=True)
    return Page([pick, *chosen.sidebar()], [about, tested, shown])


# the pages with a function of their own; every other study has one that shows its results
_OWN_PAGES: Mapping[str, Callable[[Session], Page]] = {
    "overview": overview,
    "experts": experts,
    "expert-examples": expert_gallery,
    "neuron-examples": neurons,
    "sinks": sinks,
    "channels": channels,
    "effort": effort,
    "transcript": transcript,
    "attention": attention,
    "features": features,
    "compare": compare,
    "causal": causal,
    "graph": graph,
}
# the pages that begin with a figure; others begin with text, a table or a frame, and their figures come later
FIGURE_FIRST = frozenset({"experts", "sinks", "effort", "channels"})
_BEFORE = {"overview": "Overview"}
_AFTER = {
    "transcript": "Conversations",
    "attention": "Attention",
    "causal": "Causal results",
    "graph": "Why this token",
}


def page_titles() -> dict[str, str]:
    """Return the title of every page by its address. A page of several studies has the title of the first one."""
    titles = [dict(_BEFORE), {}]
    for record in registry.studies():
        titles[record.runs - 1].setdefault(record.page or record.name, record.title)
    return titles[0] | _AFTER | titles[1]


def study_page(session: Session, page: str) -> Page:
    """Return the page of a study that has no page of its own: its question and its results.

    Raises:
        InputError: the study compares two runs, and the dashboard has one.
    """
    record = _study_of(page)
    other = chosen_partner(session, partners(session)) if record.runs == 2 else None
    names = [session.name, *([other.name] if other else [])]
    if len(names) < record.runs:
        raise InputError(f"{record.title} compares two runs: start the dashboard with two")
    about = [
        widgets.html(content.about(session.run)),
        widgets.html(f"<p class='wb-lead'>{escape(record.question)}</p>"),
    ]
    if (missing := missing_record(record, session.run)) is not None:
        return Page([], [*about, missing])
    return Page([], [*about, *study(session, record.name, *names, heading="Results", first=True)])


def _study_of(page: str) -> registry.Study:
    return next(r for r in registry.studies() if (r.page or r.name) == page)


def absent_pages(session: Session) -> set[str]:
    """Return the addresses of pages for which the run recorded nothing; none if the run cannot be read."""
    try:
        run = session.run
    except InputError:
        return set()
    absent: set[str] = {"compare"} if len(session.registry.names) < 2 else set()
    absent |= {"effort"} if len(session.registry.efforts(session.name)) < 2 else set()
    for record in registry.studies(runs=1):
        page = record.page or record.name
        if _study_of(page) == record and missing_record(record, run) is not None:
            absent.add(page)
    return (absent - {"features"}) | (set() if feature_names(run) else {"features"})


def made(page: str, session: Session) -> Page:
    """Return a page, or a message where the run is damaged, missing or lacks recorded quantities."""
    own = _OWN_PAGES.get(page)
    shown = widgets.guarded(lambda: own(session) if own is not None else study_page(session, page))
    if not isinstance(shown, Page):
        return Page([], [shown])
    notes = [widgets.alert(text) for text in session.unknown]
    return Page(shown.sidebar, [*notes, *shown.main, *further_studies(session, page)])


def further_studies(session: Session, page: str) -> list[Any]:
    """Return the sections of the studies that share a page with its main study, where the runs have what they need.

    The main study is the first of the registry with this page; the page shows it itself.
    """
    sections: list[Any] = []
    for record in [r for r in registry.studies() if (r.page or r.name) == page][1:]:
        other = chosen_partner(session, partners(session)) if record.runs == 2 else None
        names = [session.name, *([other.name] if other else [])]
        try:
            for name in names:
                record.check_recorded(session.other_run(name))
        except InputError:
            continue
        if len(names) == record.runs:
            sections += study(session, record.name, *names, heading=record.title)
    return sections
