"""The seven pages: which parts stand on each, and which choice changes what.

What sums can tell stands there at once; what a study must compute comes when it is made (see `desk`).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd
import panel as pn
import xarray as xr

from workbench.dashboards import lookup, parts, views
from workbench.dashboards.state import Choice, Shelf
from workbench.dashboards.transcript import HEIGHT, frame
from workbench.errors import InputError
from workbench.figures import effort as draw_effort
from workbench.figures import glance as draw
from workbench.figures import routing as draw_routing
from workbench.figures.drawing import Gallery
from workbench.figures.template import ThemeName
from workbench.runs import Run
from workbench.studies import glance
from workbench.studies.glance import ALL

PAGES = {
    "overview": "Overview", "experts": "Experts", "sinks": "Sinks", "channels": "Analysis and final", "effort": "Effort",
    "transcript": "Transcript", "compare": "Compare",
}  # fmt: skip


@dataclass
class Visit:
    """One person at one page: the shelf, what was chosen, and where choices are remembered."""

    shelf: Shelf
    choice: Choice
    remember: Callable[[], None]  # called when the choice has changed
    name: str = field(init=False)  # of the run

    def __post_init__(self) -> None:
        self.name = self.choice.get("run", self.shelf.names)

    @property
    def run(self) -> Run:
        """The run that is looked at, as it is now."""
        return self.shelf.run(self.name)

    @property
    def theme(self) -> ThemeName:
        """Light unless dark was asked for."""
        return "dark" if self.choice.text("theme") == "dark" else "light"

    def put(self, **chosen: str) -> None:
        """Choose, and remember it."""
        self.choice.put(**chosen)
        self.remember()


@dataclass(frozen=True)
class Page:
    """What stands on a page, whoever shows it."""

    sidebar: list[Any]
    main: list[Any]


class Selectors:
    """Widgets for what pages share: channel, effort, task, and a layer with an expert or a head of it."""

    def __init__(self, visit: Visit, *names: str) -> None:
        self.visit = visit
        known = glance.options(visit.run)
        model = visit.run.model
        options = {
            **known,
            "layer": [str(i) for i in range(model["n_layers"])],
            "expert": [str(i) for i in range(model["num_experts"])],
            "head": [str(i) for i in range(model["n_heads"])],
        }
        self.widgets: dict[str, Any] = {}
        for name in names:
            first = "analysis" if name == "channel" and visit.choice.text("channel") == "" else None
            value = visit.choice.get(name, options[name], first)
            if name == "effort":
                self.widgets[name] = pn.widgets.RadioButtonGroup(label="Effort", options=options[name], value=value)
            else:
                self.widgets[name] = parts.select(name.capitalize(), options[name], value)

    def __getitem__(self, name: str) -> str:
        return str(self.widgets[name].value) if name in self.widgets else ALL

    def number(self, name: str) -> int:
        """The number chosen: of a layer, an expert or a head."""
        return int(self[name])

    @property
    def cell(self) -> dict[str, str]:
        """Channel, effort and task."""
        return {name: self[name] for name in ("channel", "effort", "task")}

    def sidebar(self) -> list[Any]:
        """The widgets, each with its name."""
        rows: list[Any] = []
        for name, widget in self.widgets.items():
            rows += (
                [pn.pane.HTML("<label>Effort</label>", margin=(5, 10, 0, 10)), widget] if name == "effort" else [widget]
            )
        return rows

    def watch(self, show: Callable[[], None], *names: str) -> None:
        """Call when one of these changes, after remembering it; and once now."""

        def changed(*_: Any) -> None:
            self.visit.put(**{name: self[name] for name in self.widgets})
            show()

        for name in names:
            self.widgets[name].param.watch(changed, "value")
        changed()


def _box() -> pn.Column:
    return pn.Column(sizing_mode="stretch_width")


def _study(visit: Visit, study: str, *names: str, above: Sequence[str] = ()) -> list[Any]:
    """A study's figures, one at a time, what was found and how; each when the study is made. above: shown already."""

    def show(found: Mapping[str, xr.Dataset]) -> list[Any]:
        gallery: Gallery = importlib.import_module(f"workbench.figures.{study}").gallery(found)
        gallery = {name: drawing for name, drawing in gallery.items() if name not in above}
        about = [
            parts.card("What was found", parts.html(views.findings(found))),
            parts.card("How is this computed", parts.html(views.method(found)), collapsed=True),
        ]
        if not gallery:
            return about
        labels = views.figure_names(gallery)
        first = visit.choice.get("figure", list(labels.values()))
        pick = parts.select("Figure of the study", labels, first, width=420)
        shown = _box()

        def draw_it(*_: Any) -> None:
            key = str(pick.value)
            drawing = gallery[key]
            drawn = parts.guarded(
                lambda: parts.figure(drawing.draw(theme=visit.theme), f"{visit.name}-{study}-{key}", drawing.table)
            )
            shown[:] = [drawn]

        def picked(*_: Any) -> None:
            visit.put(figure=str(pick.value))
            draw_it()

        draw_it()
        pick.param.watch(picked, "value")
        return [pick, shown, *about]

    return [
        pn.pane.Markdown("## With intervals and controls", margin=(10, 10, 0, 10)),
        parts.awaited(visit.shelf.study(study, *(names or (visit.name,))), show),
    ]


def overview(visit: Visit) -> Page:
    """What the run is, how far it has come, and what it holds."""
    run, name = visit.run, visit.name
    progress = parts.html(views.progress(run))

    def refresh() -> None:
        try:
            progress.object = views.progress(visit.run)
        except InputError as error:
            progress.object = f"<b>{escape(str(error))}</b>"

    if run.status != "complete":
        pn.state.add_periodic_callback(refresh, period=2000)

    def tokens() -> Any:
        return parts.table("Tokens by channel and effort", glance.tokens(run).reset_index(), f"{name}-tokens")

    def accuracy() -> Any:
        return parts.table("Accuracy and new tokens by effort", views.accuracy_by_effort(run), f"{name}-accuracy")

    def gains() -> Any:
        costs = visit.shelf.costs(name)
        if not costs:
            return parts.html("")
        drawn = draw_effort.accuracy_by_tokens(costs["cost"], theme=visit.theme)
        return pn.Column(
            parts.figure(drawn, f"{name}-accuracy_by_tokens"),
            parts.card("What effort brings", parts.html(views.findings({"g": costs["gain"]}))),
            sizing_mode="stretch_width",
        )

    return Page(
        [],
        [
            parts.html(views.about(run)),
            progress,
            parts.guarded(tokens),
            parts.guarded(accuracy),
            parts.later(gains),
            parts.card("Provenance", parts.html(views.provenance(run)), collapsed=True),
        ],
    )


@dataclass(frozen=True)
class Cells:
    """What a page of layer × expert and one of layer × head have in common."""

    study: str
    column: str
    measures: Mapping[str, draw.Measure]
    sums: Callable[..., xr.Dataset]
    one: Callable[[Visit, Selectors], Any]  # the page of one expert or head


def _cells(visit: Visit, cells: Cells, folded: Callable[[Selectors], Any] | None = None) -> Page:
    """A heat map of any selection; a page for the cell that was chosen or clicked; and the study."""
    run, name = visit.run, visit.name
    chosen = Selectors(visit, "channel", "effort", "task", "layer", cells.column)
    measure = parts.select("Measure", cells.measures, visit.choice.get("measure", list(cells.measures.values())))
    heat, one, more = _box(), _box(), _box()

    def clicked(data: Any) -> None:
        if point := ((data or {}).get("points") or [None])[0]:
            chosen.widgets["layer"].value, chosen.widgets[cells.column].value = str(point["y"]), str(point["x"])

    def show_heat() -> None:
        def body() -> Any:
            ds = cells.sums(run, **chosen.cell)
            drawn = draw.heatmap(ds, measure.value, theme=visit.theme)
            label = "-".join([name, str(measure.value), *chosen.cell.values()])
            return parts.figure(drawn, label, lambda: ds.to_dataframe().reset_index(), click=clicked)

        heat[:] = [parts.guarded(body)]  # a new pane: plotly fails when a figure changes while it is drawn

    def show_one() -> None:
        title = f"## Layer {chosen['layer']}, {cells.column} {chosen[cells.column]}"
        one[:] = [pn.pane.Markdown(title, margin=(10, 10, 0, 10)), parts.guarded(lambda: cells.one(visit, chosen))]

    def show_more() -> None:
        if folded is not None:
            open_ = bool(more.objects) and not more[0].collapsed
            more[:] = [folded(chosen)]
            more[0].collapsed = not open_

    def remember(*_: Any) -> None:
        visit.put(measure=str(measure.value))
        show_heat()

    chosen.watch(show_heat, "channel", "effort", "task")
    chosen.watch(show_one, "channel", "task", "layer", cells.column)
    chosen.watch(show_more, "channel", "layer")
    measure.param.watch(remember, "value")
    side = chosen.sidebar()
    return Page(
        [*side[:4], measure, *side[4:]], [parts.html(views.about(run)), heat, one, more, *_study(visit, cells.study)]
    )


def experts(visit: Visit) -> Page:
    """Which experts, of any selection; one expert's page; who works with and follows whom; and the routing study."""
    run = visit.run
    if "routing" not in run.recorded:
        raise InputError(f"{visit.name} has no routing: it recorded {', '.join(run.recorded)}")

    def folded(chosen: Selectors) -> pn.Card:
        title = f"Who works together in layer {chosen['layer']}, and who follows"
        return parts.folded(title, lambda: _pairs(visit, chosen))

    measures: dict[str, draw.Measure] = {"load": "load", "gate weight": "gates", "lift over the run": "lift"}
    return _cells(visit, Cells("routing", "expert", measures, glance.routing, _expert), folded)


def _expert(visit: Visit, chosen: Selectors) -> pn.Column:
    """Where an expert acts, whom it works with, and which tokens go to it."""
    run, layer, expert = visit.run, chosen.number("layer"), chosen.number("expert")
    words = lookup.vocabulary(run)
    label = f"{visit.name}-layer-{layer}-expert-{expert}"
    acts = glance.by_channel_and_effort(run, "load", layer, expert, chosen["task"]).round(2)
    cards: list[Any] = [parts.table("Where it acts: its load over an even share", acts, f"{label}-load")]
    together = visit.shelf.pairs(visit.name)
    if together is not None and chosen["channel"] != ALL:
        partners = views.partners(together, chosen["channel"], layer, expert)
        cards.append(parts.table(f"Whom it works with, in {chosen['channel']}", partners, f"{label}-with"))

    def tokens() -> Any:
        rows = lookup.expert_tokens(run, layer, expert, lambda i: lookup.shown(i, words))
        return parts.table("Its tokens", rows, f"{label}-tokens")

    return pn.Column(pn.FlexBox(*cards), parts.later(tokens), sizing_mode="stretch_width")


def _pairs(visit: Visit, chosen: Selectors) -> pn.Column:
    """Experts chosen together in a layer, and where they lead in the next."""
    together, layer = visit.shelf.pairs(visit.name), chosen.number("layer")
    if together is None:
        return pn.Column(parts.alert("this run keeps no pairs of experts", "info"))
    if chosen["channel"] == ALL:
        return pn.Column(parts.alert("choose a channel to see which of its experts work together", "info"))
    drawn = [("together", draw_routing.lift_heatmap(together, chosen["channel"], layer, theme=visit.theme))]
    if layer in together["layer_pair"].values:
        drawn.append(("next", draw_routing.transition_heatmap(together, chosen["channel"], layer, theme=visit.theme)))
    label = f"{visit.name}-{chosen['channel']}-layer-{layer}"
    return pn.Column(*(parts.figure(f, f"{label}-{n}") for n, f in drawn), sizing_mode="stretch_width")


def sinks(visit: Visit) -> Page:
    """Where attention rests, of any selection; one head's page; and the sinks study."""
    run = visit.run
    if not {"sinks", "sink_sums"} & set(run.recorded):
        raise InputError(f"{visit.name} has no sinks: it recorded {', '.join(run.recorded)}")
    measures: dict[str, draw.Measure] = {"sink mass": "mass", "its spread over tokens": "spread"}
    return _cells(visit, Cells("sinks", "head", measures, glance.sinks, _head))


def _head(visit: Visit, chosen: Selectors) -> pn.Column:
    """What a head sees, how much it leaves on its sink and, of single tokens, along position and at which."""
    run, layer, head = visit.run, chosen.number("layer"), chosen.number("head")
    words = lookup.vocabulary(run)
    label = f"{visit.name}-layer-{layer}-head-{head}"
    mass = glance.by_channel_and_effort(run, "mass", layer, head, chosen["task"]).round(4)
    cards: list[Any] = [
        parts.html(escape(views.about_head(run, layer, head))),
        parts.table("Its mean mass on the sink", mass, f"{label}-mass"),
    ]
    if "sinks" not in run.recorded:
        cards.append(
            parts.alert("this run kept sums of sinks, not those of single tokens: no curve by position", "info")
        )
        return pn.Column(*cards, sizing_mode="stretch_width")

    def position() -> Any:
        rows = lookup.head_by_position(run, layer, head)
        drawn = draw.position_curve(rows, run.digest, layer, head, theme=visit.theme)
        return parts.figure(drawn, f"{label}-position", rows.reset_index)

    def tokens() -> Any:
        rows = lookup.head_tokens(run, layer, head, lambda i: lookup.shown(i, words))
        return parts.table("Tokens at which it rests more than at nine tenths of tokens", rows, f"{label}-tokens")

    return pn.Column(*cards, parts.later(position), parts.later(tokens), sizing_mode="stretch_width")


def channels(visit: Visit) -> Page:
    """Analysis against final: the difference as it is at once, then with its control."""
    run, name = visit.run, visit.name
    chosen = Selectors(visit, "effort", "task")
    raw = _box()

    def show() -> None:
        cell = {"effort": chosen["effort"], "task": chosen["task"]}

        def body(kind: Callable[..., xr.Dataset], measure: draw.Measure) -> Any:
            a, b = (kind(run, channel=channel, **cell) for channel in ("analysis", "final"))
            drawn = draw.difference(a, b, measure, theme=visit.theme)
            rows = pd.concat([d[[measure]].to_dataframe().reset_index().assign(of=d.attrs["title"]) for d in (a, b)])
            return parts.figure(drawn, f"{name}-analysis-final-{measure}", lambda: rows)

        raw[:] = [
            *([parts.guarded(lambda: body(glance.routing, "load"))] if "routing" in run.recorded else []),
            *(
                [parts.guarded(lambda: body(glance.sinks, "mass"))]
                if {"sinks", "sink_sums"} & set(run.recorded)
                else []
            ),
        ]

    chosen.watch(show, "effort", "task")
    return Page(chosen.sidebar(), [parts.html(views.about(run)), raw, *_study(visit, "channels")])


def effort(visit: Visit) -> Page:
    """What thinking harder costs and brings, by task; then what differs at equal position."""
    run, name = visit.run, visit.name
    costs = visit.shelf.costs(name)
    if not costs:
        raise InputError(f"{name} has one effort, and this page compares at least two: capture transcripts of several")
    chosen = Selectors(visit, "task")
    curve = _box()

    def show() -> None:
        def body() -> Any:
            cost, task = costs["cost"], chosen["task"]
            drawn = draw_effort.accuracy_by_tokens(cost, task, theme=visit.theme)
            rows = cost.sel(task=task).to_dataframe().reset_index()
            return pn.Column(
                parts.figure(drawn, f"{name}-accuracy_by_tokens-{task}", lambda: rows),
                parts.card("What each step adds, paired by prompt", parts.html(views.gains(costs["gain"], task))),
                sizing_mode="stretch_width",
            )

        curve[:] = [parts.guarded(body)]

    chosen.watch(show, "task")
    return Page(
        chosen.sidebar(), [parts.html(views.about(run)), curve, *_study(visit, "effort", above=["accuracy_by_tokens"])]
    )


def transcript(visit: Visit) -> Page:
    """One conversation, its tokens coloured by what was recorded, replayed token by token."""
    run = visit.run
    if run.sequences.empty:
        raise InputError("the run holds no conversation yet")
    words = lookup.vocabulary(run)
    chosen = Selectors(visit, "task", "effort", "channel", "layer", "expert")
    for name, value in (("channel", ALL), ("effort", glance.options(run)["effort"][-1])):
        if not visit.choice.text(name):
            chosen.widgets[name].value = value
    find = pn.widgets.TextInput(label="Id, answer or text contains", value=visit.choice.text("find"), width=parts.WIDTH)
    orders = (
        {"as captured": "", "most of the expert first": "expert"} if "routing" in run.recorded else {"as captured": ""}
    )
    order = parts.select("Order", orders, visit.choice.get("order", list(orders.values())))
    pick = parts.select("Conversation", {}, None, size=12)
    before, after = (pn.widgets.Button(label=text, width=parts.WIDTH // 2 - 8) for text in ("‹ previous", "next ›"))
    shown = _box()

    def fill() -> None:
        visit.put(find=str(find.value), order=str(order.value))

        def body() -> dict[str, int]:
            expert = (chosen.number("layer"), chosen.number("expert")) if order.value else None
            return lookup.conversations(
                run, task=chosen["task"], effort=chosen["effort"], channel=chosen["channel"], text=str(find.value),
                expert=expert,
            )  # fmt: skip

        pick.loading = True
        found = parts.guarded(body)
        pick.loading = False
        if not isinstance(found, dict):
            shown[:] = [found]
            return
        wanted = int(visit.choice.text("sequence")) if visit.choice.text("sequence").isdecimal() else None
        pick.param.update(options=found, value=wanted if wanted in found.values() else next(iter(found.values()), None))
        if not found:
            shown[:] = [parts.alert("no conversation is like that", "info")]

    def show(*_: Any) -> None:
        if pick.value is None:
            return
        number = int(pick.value)
        visit.put(sequence=str(number))

        def body() -> Any:
            text = frame(run, number, words, visit.theme)
            return pn.pane.HTML(text, height=HEIGHT + 10, sizing_mode="stretch_width")

        shown[:] = [parts.html(views.about_sequence(run, number)), parts.guarded(body)]

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


def compare(visit: Visit) -> Page:
    """Two runs side by side on the same transcripts."""
    name = visit.name
    others = [other for other in visit.shelf.names if other != name]
    if not others:
        text = "Start the dashboard with two runs of the same transcripts: workbench dashboard A.zarr B.zarr"
        return Page([], [parts.alert(text, "info")])
    chosen = Selectors(visit, "channel", "effort", "task")
    pick = parts.select("With", others, visit.choice.get("with", others))
    shown, study = _box(), _box()

    def show() -> None:
        other = str(pick.value)

        def body() -> Any:
            runs = [visit.run, visit.shelf.run(other)]
            sets = [glance.routing(run, **chosen.cell) for run in runs]
            for ds, label in zip(sets, (name, other), strict=True):
                ds.attrs["title"] = f"{label}, {ds.attrs['title']}"
            drawn = [draw.heatmap(ds, "load", theme=visit.theme) for ds in sets]
            if sets[0]["load"].shape == sets[1]["load"].shape:
                drawn.append(draw.difference(sets[0], sets[1], "load", theme=visit.theme))
            about = [
                parts.html(f"<b>{escape(n)}</b> {views.about(r)}") for n, r in zip((name, other), runs, strict=True)
            ]
            return pn.Column(
                *about,
                *(parts.figure(f, f"{name}-{other}-{i}") for i, f in enumerate(drawn)),
                sizing_mode="stretch_width",
            )

        shown[:] = [parts.guarded(body)]

    def another(*_: Any) -> None:
        visit.put(**{"with": str(pick.value)})
        show()
        study[:] = _study(visit, "compare", name, str(pick.value))

    chosen.watch(show, "channel", "effort", "task")
    pick.param.watch(another, "value")
    study[:] = _study(visit, "compare", name, str(pick.value))
    return Page([pick, *chosen.sidebar()], [study, shown])


MAKERS: Mapping[str, Callable[[Visit], Page]] = {
    "overview": overview, "experts": experts, "sinks": sinks, "channels": channels, "effort": effort,
    "transcript": transcript, "compare": compare,
}  # fmt: skip


def made(page: str, visit: Visit) -> Page:
    """A page or, where the run is damaged, gone or lacks what it needs, what is the matter: never a blank one."""
    shown = parts.guarded(lambda: MAKERS[page](visit))
    return shown if isinstance(shown, Page) else Page([], [shown])
