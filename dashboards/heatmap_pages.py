"""The pages of layer × expert and of layer × head: a map of any selection, one cell's own page, and the study."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import panel as pn
import xarray as xr

from workbench.dashboards import content, search, widgets
from workbench.dashboards.session import Page, Selectors, Session, box, study
from workbench.errors import InputError
from workbench.figures import quick_look as draw
from workbench.figures import routing as draw_routing
from workbench.studies import quick_look
from workbench.studies.quick_look import ALL


@dataclass(frozen=True)
class Cells:
    """What a page of layer × expert and one of layer × head have in common."""

    study: str
    column: str
    measures: Mapping[str, draw.Measure]
    sums: Callable[..., xr.Dataset]
    one: Callable[[Session, Selectors], Any]  # the page of one expert or head


def _cells(visit: Session, cells: Cells, folded: Callable[[Selectors], Any] | None = None) -> Page:
    """A heat map of any selection; a page for the cell that was chosen or clicked; and the study."""
    run, name = visit.run, visit.name
    chosen = Selectors(visit, "channel", "effort", "task", "layer", cells.column)
    measure = widgets.select("Measure", cells.measures, visit.choice.get("measure", list(cells.measures.values())))
    heat, one, more = box(), box(), box()

    def clicked(data: Any) -> None:
        if point := ((data or {}).get("points") or [None])[0]:
            chosen.widgets["layer"].value, chosen.widgets[cells.column].value = str(point["y"]), str(point["x"])

    def show_heat() -> None:
        def body() -> Any:
            ds = cells.sums(run, **chosen.cell)
            drawn = draw.heatmap(ds, measure.value, theme=visit.theme)
            label = "-".join([name, str(measure.value), *chosen.cell.values()])
            return widgets.figure(drawn, label, lambda: ds.to_dataframe().reset_index(), click=clicked)

        heat[:] = [widgets.guarded(body)]  # a new pane: plotly fails when a figure changes while it is drawn

    def show_one() -> None:
        title = f"## Layer {chosen['layer']}, {cells.column} {chosen[cells.column]}"
        one[:] = [pn.pane.Markdown(title, margin=(10, 10, 0, 10)), widgets.guarded(lambda: cells.one(visit, chosen))]

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
        [*side[:4], measure, *side[4:]], [widgets.html(content.about(run)), heat, one, more, *study(visit, cells.study)]
    )


def experts(visit: Session) -> Page:
    """Which experts, of any selection; one expert's page; who works with and follows whom; and the routing study."""
    run = visit.run
    if "routing" not in run.recorded:
        raise InputError(f"{visit.name} has no routing: it recorded {', '.join(run.recorded)}")

    def folded(chosen: Selectors) -> pn.Card:
        title = f"Who works together in layer {chosen['layer']}, and who follows"
        return widgets.folded(title, lambda: _pairs(visit, chosen))

    measures: dict[str, draw.Measure] = {"load": "load", "gate weight": "gates", "lift over the run": "lift"}
    return _cells(visit, Cells("routing", "expert", measures, quick_look.routing, _expert), folded)


def _expert(visit: Session, chosen: Selectors) -> pn.Column:
    """Where an expert acts, whom it works with, and which tokens go to it."""
    run, layer, expert = visit.run, chosen.number("layer"), chosen.number("expert")
    words = search.vocabulary(run)
    label = f"{visit.name}-layer-{layer}-expert-{expert}"
    acts = quick_look.by_channel_and_effort(run, "load", layer, expert, chosen["task"]).round(2)
    cards: list[Any] = [widgets.table("Where it acts: its load over an even share", acts, f"{label}-load")]
    together = visit.shelf.pairs(visit.name)
    if together is not None and chosen["channel"] != ALL:
        partners = content.partners(together, chosen["channel"], layer, expert)
        cards.append(widgets.table(f"Whom it works with, in {chosen['channel']}", partners, f"{label}-with"))

    def tokens() -> Any:
        rows = search.expert_tokens(run, layer, expert, lambda i: search.shown(i, words))
        return widgets.table("Its tokens", rows, f"{label}-tokens")

    return pn.Column(widgets.beside(*cards), widgets.later(tokens), sizing_mode="stretch_width")


def _pairs(visit: Session, chosen: Selectors) -> pn.Column:
    """Experts chosen together in a layer, and where they lead in the next."""
    together, layer = visit.shelf.pairs(visit.name), chosen.number("layer")
    if together is None:
        return pn.Column(widgets.alert("this run keeps no pairs of experts", "info"))
    if chosen["channel"] == ALL:
        return pn.Column(widgets.alert("choose a channel to see which of its experts work together", "info"))
    drawn = [("together", draw_routing.lift_heatmap(together, chosen["channel"], layer, theme=visit.theme))]
    if layer in together["layer_pair"].values:
        drawn.append(("next", draw_routing.transition_heatmap(together, chosen["channel"], layer, theme=visit.theme)))
    label = f"{visit.name}-{chosen['channel']}-layer-{layer}"
    return pn.Column(*(widgets.figure(f, f"{label}-{n}") for n, f in drawn), sizing_mode="stretch_width")


def sinks(visit: Session) -> Page:
    """Where attention rests, of any selection; one head's page; and the sinks study."""
    run = visit.run
    if not {"sinks", "sink_sums"} & set(run.recorded):
        raise InputError(f"{visit.name} has no sinks: it recorded {', '.join(run.recorded)}")
    measures: dict[str, draw.Measure] = {"sink mass": "mass", "its spread over tokens": "spread"}
    return _cells(visit, Cells("sinks", "head", measures, quick_look.sinks, _head))


def _head(visit: Session, chosen: Selectors) -> pn.Column:
    """What a head sees, how much it leaves on its sink and, of single tokens, along position and at which."""
    run, layer, head = visit.run, chosen.number("layer"), chosen.number("head")
    words = search.vocabulary(run)
    label = f"{visit.name}-layer-{layer}-head-{head}"
    mass = quick_look.by_channel_and_effort(run, "mass", layer, head, chosen["task"]).round(4)
    cards: list[Any] = [
        widgets.html(escape(content.about_head(run, layer, head))),
        widgets.table("Its mean mass on the sink", mass, f"{label}-mass"),
    ]
    if "sinks" not in run.recorded:
        cards.append(
            widgets.alert("this run kept sums of sinks, not those of single tokens: no curve by position", "info")
        )
        return pn.Column(*cards, sizing_mode="stretch_width")

    def position() -> Any:
        rows = search.head_by_position(run, layer, head)
        drawn = draw.position_curve(rows, run.digest, layer, head, theme=visit.theme)
        return widgets.figure(drawn, f"{label}-position", rows.reset_index)

    def tokens() -> Any:
        rows = search.head_tokens(run, layer, head, lambda i: search.shown(i, words))
        return widgets.table("Tokens at which it rests more than at nine tenths of tokens", rows, f"{label}-tokens")

    return pn.Column(*cards, widgets.later(position), widgets.later(tokens), sizing_mode="stretch_width")
