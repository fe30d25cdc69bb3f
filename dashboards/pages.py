"""The seven pages: which parts stand on each, and which choice changes what.

What sums can tell stands there at once; what a study must compute comes when it is made (see `desk`).
"""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import pandas as pd
import panel as pn
import xarray as xr

from workbench.dashboards import content, search, widgets
from workbench.dashboards.conversation import HEIGHT, frame
from workbench.dashboards.heatmap_pages import experts, sinks
from workbench.dashboards.session import Page, Selectors, Session, box, study
from workbench.errors import InputError
from workbench.figures import effort as draw_effort
from workbench.figures import quick_look as draw
from workbench.studies import quick_look
from workbench.studies.quick_look import ALL

PAGES = {
    "overview": "Overview", "experts": "Experts", "sinks": "Sinks", "channels": "Analysis and final", "effort": "Effort",
    "transcript": "Transcript", "compare": "Compare",
}  # fmt: skip


def overview(visit: Session) -> Page:
    """What the run is, how far it has come, and what it holds."""
    run, name = visit.run, visit.name
    progress = widgets.html(content.progress(run))

    def refresh() -> None:
        try:
            progress.object = content.progress(visit.run)
        except InputError as error:
            progress.object = f"<b>{escape(str(error))}</b>"

    if run.status != "complete":
        pn.state.add_periodic_callback(refresh, period=2000)

    def tokens() -> Any:
        return widgets.table("Tokens by channel and effort", quick_look.tokens(run).reset_index(), f"{name}-tokens")

    def roles() -> Any:
        return widgets.table(
            "Tokens that messages say, by role and channel", content.tokens_by_role(run), f"{name}-roles"
        )

    def accuracy() -> Any:
        return widgets.table("Accuracy and new tokens by effort", content.accuracy_by_effort(run), f"{name}-accuracy")

    def gains() -> Any:
        costs = visit.shelf.costs(name)
        if not costs:
            return widgets.html("")
        drawn = draw_effort.accuracy_by_tokens(costs["cost"], theme=visit.theme)
        return pn.Column(
            widgets.figure(drawn, f"{name}-accuracy_by_tokens"),
            widgets.card("What effort brings", widgets.html(content.findings({"g": costs["gain"]}))),
            sizing_mode="stretch_width",
        )

    return Page(
        [],
        [
            widgets.html(content.about(run)),
            progress,
            widgets.beside(widgets.guarded(tokens), widgets.guarded(accuracy)),
            widgets.later(gains),
            widgets.later(roles),
            widgets.card("Provenance", widgets.html(content.provenance(run)), collapsed=True),
        ],
    )


def channels(visit: Session) -> Page:
    """Analysis against final: the difference as it is at once, then with its control."""
    run, name = visit.run, visit.name
    chosen = Selectors(visit, "effort", "task")
    raw = box()

    def show() -> None:
        cell = {"effort": chosen["effort"], "task": chosen["task"]}

        def body(kind: Callable[..., xr.Dataset], measure: draw.Measure) -> Any:
            a, b = (kind(run, channel=channel, **cell) for channel in ("analysis", "final"))
            drawn = draw.difference(a, b, measure, theme=visit.theme)
            rows = pd.concat([d[[measure]].to_dataframe().reset_index().assign(of=d.attrs["title"]) for d in (a, b)])
            return widgets.figure(drawn, f"{name}-analysis-final-{measure}", lambda: rows)

        raw[:] = [
            *([widgets.guarded(lambda: body(quick_look.routing, "load"))] if "routing" in run.recorded else []),
            *(
                [widgets.guarded(lambda: body(quick_look.sinks, "mass"))]
                if {"sinks", "sink_sums"} & set(run.recorded)
                else []
            ),
        ]

    chosen.watch(show, "effort", "task")
    return Page(chosen.sidebar(), [widgets.html(content.about(run)), raw, *study(visit, "channels")])


def effort(visit: Session) -> Page:
    """What thinking harder costs and brings, by task; then what differs at equal position."""
    run, name = visit.run, visit.name
    costs = visit.shelf.costs(name)
    if not costs:
        raise InputError(f"{name} has one effort, and this page compares at least two: capture transcripts of several")
    chosen = Selectors(visit, "task")
    curve = box()

    def show() -> None:
        def body() -> Any:
            cost, task = costs["cost"], chosen["task"]
            drawn = draw_effort.accuracy_by_tokens(cost, task, theme=visit.theme)
            rows = cost.sel(task=task).to_dataframe().reset_index()
            return pn.Column(
                widgets.figure(drawn, f"{name}-accuracy_by_tokens-{task}", lambda: rows),
                widgets.card("What each step adds, paired by prompt", widgets.html(content.gains(costs["gain"], task))),
                sizing_mode="stretch_width",
            )

        curve[:] = [widgets.guarded(body)]

    chosen.watch(show, "task")
    return Page(
        chosen.sidebar(),
        [widgets.html(content.about(run)), curve, *study(visit, "effort", above=["accuracy_by_tokens"])],
    )


def transcript(visit: Session) -> Page:
    """One conversation, its tokens coloured by what was recorded, replayed token by token."""
    run = visit.run
    if run.sequences.empty:
        raise InputError("the run holds no conversation yet")
    words = search.vocabulary(run)
    chosen = Selectors(visit, "task", "effort", "channel", "layer", "expert")
    for name, value in (("channel", ALL), ("effort", quick_look.options(run)["effort"][-1])):
        if not visit.choice.text(name):
            chosen.widgets[name].value = value
    find = pn.widgets.TextInput(
        label="Id, answer or text contains", value=visit.choice.text("find"), width=widgets.WIDTH
    )
    orders = (
        {"as captured": "", "most of the expert first": "expert"} if "routing" in run.recorded else {"as captured": ""}
    )
    order = widgets.select("Order", orders, visit.choice.get("order", list(orders.values())))
    pick = widgets.select("Conversation", {}, None, size=12)
    before, after = (pn.widgets.Button(label=text, width=widgets.WIDTH // 2 - 8) for text in ("‹ previous", "next ›"))
    shown = box()

    def fill() -> None:
        visit.put(find=str(find.value), order=str(order.value))

        def body() -> dict[str, int]:
            expert = (chosen.number("layer"), chosen.number("expert")) if order.value else None
            return search.conversations(
                run, task=chosen["task"], effort=chosen["effort"], channel=chosen["channel"], text=str(find.value),
                expert=expert,
            )  # fmt: skip

        pick.loading = True
        found = widgets.guarded(body)
        pick.loading = False
        if not isinstance(found, dict):
            shown[:] = [found]
            return
        wanted = int(visit.choice.text("sequence")) if visit.choice.text("sequence").isdecimal() else None
        pick.param.update(options=found, value=wanted if wanted in found.values() else next(iter(found.values()), None))
        if not found:
            shown[:] = [widgets.alert("no conversation is like that", "info")]

    def show(*_: Any) -> None:
        if pick.value is None:
            return
        number = int(pick.value)
        visit.put(sequence=str(number))

        def body() -> Any:
            text = frame(run, number, words, visit.theme)
            return pn.pane.HTML(text, height=HEIGHT + 10, sizing_mode="stretch_width")

        shown[:] = [widgets.html(content.about_sequence(run, number)), widgets.guarded(body)]

    def step(by: int) -> None:
        values = list(pick.options.values())
        if values:
            pick.value = values[(values.index(pick.value) + by) % len(values)]

    pick.param.watch(show, "value")
    chosen.watch(fill, *chosen.widgets)
    for widget in (find, order):
        widget.param.watch(lambda _: fill(), "value")
    before.on_click(lambda _: step(-1))
    after.on_click(lambda _: step(1))
    return Page([find, pick, pn.Row(before, after), order, *chosen.sidebar()], [shown])


def compare(visit: Session) -> Page:
    """Two runs side by side on the same transcripts."""
    name = visit.name
    others = [other for other in visit.shelf.names if other != name]
    if not others:
        text = "Start the dashboard with two runs of the same transcripts: workbench dashboard A.zarr B.zarr"
        return Page([], [widgets.alert(text, "info")])
    chosen = Selectors(visit, "channel", "effort", "task")
    pick = widgets.select("With", others, visit.choice.get("with", others))
    shown, told = box(), box()

    def show() -> None:
        other = str(pick.value)

        def body() -> Any:
            runs = [visit.run, visit.shelf.run(other)]
            sets = [quick_look.routing(run, **chosen.cell) for run in runs]
            for ds, label in zip(sets, (name, other), strict=True):
                ds.attrs["title"] = f"{label}, {ds.attrs['title']}"
            drawn = [draw.heatmap(ds, "load", theme=visit.theme) for ds in sets]
            if sets[0]["load"].shape == sets[1]["load"].shape:
                drawn.append(draw.difference(sets[0], sets[1], "load", theme=visit.theme))
            about = [
                widgets.html(f"<b>{escape(n)}</b> {content.about(r)}") for n, r in zip((name, other), runs, strict=True)
            ]
            return pn.Column(
                *about,
                *(widgets.figure(f, f"{name}-{other}-{i}") for i, f in enumerate(drawn)),
                sizing_mode="stretch_width",
            )

        shown[:] = [widgets.guarded(body)]

    def another(*_: Any) -> None:
        visit.put(**{"with": str(pick.value)})
        show()
        told[:] = study(visit, "compare", name, str(pick.value))

    chosen.watch(show, "channel", "effort", "task")
    pick.param.watch(another, "value")
    told[:] = study(visit, "compare", name, str(pick.value))
    return Page([pick, *chosen.sidebar()], [told, shown])


MAKERS: Mapping[str, Callable[[Session], Page]] = {
    "overview": overview, "experts": experts, "sinks": sinks, "channels": channels, "effort": effort,
    "transcript": transcript, "compare": compare,
}  # fmt: skip


def made(page: str, visit: Session) -> Page:
    """A page or, where the run is damaged, gone or lacks what it needs, what is the matter: never a blank one."""
    shown = widgets.guarded(lambda: MAKERS[page](visit))
    return shown if isinstance(shown, Page) else Page([], [shown])
