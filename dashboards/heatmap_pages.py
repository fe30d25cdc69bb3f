"""The expert and head pages: a heat map by layer, the details of one expert or head, and the study."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

from workbench.dashboards import content, expert_sections, neurons_page, python_code, search, widgets
from workbench.dashboards.session import Page, Selectors, Session, box, not_recorded, study
from workbench.figures import quick_look as draw
from workbench.figures import routing as draw_routing
from workbench.studies import quick_look
from workbench.studies.quick_look import ALL


@dataclass(frozen=True)
class Cells:
    """What the expert page and the head page have in common."""

    study: str
    column: str
    measures: Mapping[str, draw.Measure]
    sums: Callable[..., xr.Dataset]
    one: Callable[[Session, Selectors], Any]  # the page of one expert or head
    first: str  # the variable of `sums` whose largest value is shown in detail at first


def _cells(session: Session, cells: Cells, folded: Callable[[Selectors], Any] | None = None) -> Page:
    """Return a page with a heat map of the selection, the details of the selected or clicked cell, and the study."""
    run, name = session.run, session.name
    chosen = Selectors(session, "channel", "effort", "task", "layer", cells.column)
    measure = widgets.select("Measure", cells.measures, session.choice.get("measure", list(cells.measures.values())))
    heat, one, more = box(), box(), box()
    if not (session.choice.text("layer") or session.choice.text(cells.column)):
        _choose_largest(session, chosen, cells)

    def clicked(data: Any) -> None:
        if point := ((data or {}).get("points") or [None])[0]:
            chosen.select(layer=str(point["y"]), **{cells.column: str(point["x"])})

    def show_heat() -> None:
        def body() -> Any:
            ds = cells.sums(run, **chosen.cell)
            cell = (chosen.number("layer"), chosen.number(cells.column))
            drawn = draw.heatmap(ds, measure.value, marked=cell, theme=session.theme)
            label = "-".join([name, str(measure.value), *chosen.cell.values()])
            code = python_code.selection_heatmap(
                run, cells.sums.__name__, measure.value, chosen.cell, session.exclude, session.theme, marked=cell
            )
            return widgets.figure(drawn, label, lambda: ds.to_dataframe().reset_index(), python=code, click=clicked)

        heat[:] = [widgets.guarded(body)]  # a new pane: plotly fails when a figure changes while it is drawn

    def show_one() -> None:
        title = f"<h2>Layer {chosen['layer']}, {cells.column} {chosen[cells.column]}</h2>"
        one[:] = [widgets.html(title), widgets.deferred(lambda: cells.one(session, chosen))]

    def show_more() -> None:
        if folded is not None:
            open_ = bool(more.objects) and not more[0].collapsed
            more[:] = [folded(chosen)]
            more[0].collapsed = not open_

    def remember(*_: Any) -> None:
        session.put(measure=str(measure.value))
        show_heat()

    chosen.watch(show_heat, "channel", "effort", "task", "layer", cells.column)
    chosen.watch(show_one, "channel", "effort", "task", "layer", cells.column)
    chosen.watch(show_more, "channel", "layer")
    measure.param.watch(remember, "value")
    side = chosen.sidebar()
    return Page(
        [*side[:4], measure, *side[4:]],
        [widgets.html(content.about(run)), heat, one, more, *study(session, cells.study)],
    )


def _choose_largest(session: Session, chosen: Selectors, cells: Cells) -> None:
    """Select the layer and the expert or head with the largest value in the selected channel, effort and task."""
    values = cells.sums(session.run, **chosen.cell)[cells.first].values
    if np.isfinite(values).any():
        layer, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
        chosen.widgets["layer"].value, chosen.widgets[cells.column].value = str(layer), str(column)


def experts(session: Session) -> Page:
    """Return the expert page: load heat map, one expert, co-activated experts, and the routing study."""
    run = session.run
    if "routing" not in run.recorded:
        return Page([], [widgets.html(content.about(run)), not_recorded(run, "routing", "--record routing")])

    def folded(chosen: Selectors) -> pn.Card:
        note = f"Pairs of experts in layer {chosen['layer']}, and of that layer and the next; all efforts and tasks"
        return widgets.folded("Co-activation and transitions", lambda: _pairs(session, chosen), note=note)

    measures: dict[str, draw.Measure] = {
        "relative to uniform (log₂)": "relative",
        "relative to uniform": "load",
        "gate weight": "gates",
        "relative to the whole run": "lift",
    }
    return _cells(session, Cells("routing", "expert", measures, quick_look.routing, _expert, "load"), folded)


def _expert(session: Session, chosen: Selectors) -> pn.Column:
    """Return the details of one expert: load by channel and effort, co-activated experts, effects and examples."""
    run, layer, expert = session.run, chosen.number("layer"), chosen.number("expert")
    label = f"{session.name}-layer-{layer}-expert-{expert}"
    acts = quick_look.by_channel_and_effort(run, "load", layer, expert, chosen["task"]).round(2)
    note = f"Load relative to uniform, {_of_task(chosen)}: 1 is an equal load of all experts"
    cards: list[Any] = [widgets.table("Load by channel and effort", acts, f"{label}-load", note=note)]
    together = session.registry.pairs(session.name, session.exclude)
    if together is not None and chosen["channel"] != ALL:
        partners = content.partners(together, chosen["channel"], layer, expert)
        links = [session.link("experts", expert=str(other)) for other in partners["with expert"]]
        note = f"In {chosen['channel']}, all efforts and tasks; lift: relative to independent choices"
        cards.append(
            widgets.table("Co-activated experts", partners, f"{label}-with", {"with expert": links}, note=note)
        )
    cards += expert_sections.logit_effects(session, layer, expert)
    cards += expert_sections.measured_effects(session, layer, expert)
    return pn.Column(
        widgets.beside(*cards),
        expert_sections.examples(session, chosen),
        *neurons_page.strongest(session, layer, expert),
        expert_sections.load_with_intervals(session, layer, expert),
        sizing_mode="stretch_width",
    )


def _of_task(chosen: Selectors) -> str:
    return "all tasks" if chosen["task"] == ALL else f"task {chosen['task']}"


def _examples(session: Session, title: str, note: str, rows: pd.DataFrame, name: str, colour: str) -> Any:
    """Return the table of tokens; an example opens its conversation at the token. colour: quantity shown there."""
    at = zip(rows["sequence"], rows["position"], strict=True)
    links = [session.link("transcript", sequence=str(s), pin=str(p), position="", colour=colour) for s, p in at]
    shown = rows.drop(columns=["sequence", "position"])
    return widgets.table(title, shown, name, {"for example": links}, note=note)


def _pairs(session: Session, chosen: Selectors) -> pn.Column:
    """Return co-activation in a layer and transitions to experts of the next layer."""
    together, layer = session.registry.pairs(session.name, session.exclude), chosen.number("layer")
    if together is None:
        return pn.Column(widgets.alert("This run has no recorded pairs of experts.", "info"))
    if chosen["channel"] == ALL:
        return pn.Column(widgets.alert("Select a channel to see its co-activated experts.", "info"))
    drawn = [("together", draw_routing.lift_heatmap(together, chosen["channel"], layer, theme=session.theme))]
    if layer in together["layer_pair"].values:
        drawn.append(("next", draw_routing.transition_heatmap(together, chosen["channel"], layer, theme=session.theme)))
    label = f"{session.name}-{chosen['channel']}-layer-{layer}"
    return pn.Column(*(widgets.figure(f, f"{label}-{n}") for n, f in drawn), sizing_mode="stretch_width")


def sinks(session: Session) -> Page:
    """Return the sink page: mean sink attention by layer and head, one head, and the sinks study."""
    run = session.run
    if not {"sinks", "sink_sums"} & set(run.recorded):
        return Page([], [widgets.html(content.about(run)), not_recorded(run, "sink attention", "--record sinks")])
    measures: dict[str, draw.Measure] = {"mean sink attention": "mass", "standard deviation over tokens": "spread"}
    return _cells(session, Cells("sinks", "head", measures, quick_look.sinks, _head, "mass"))


def _head(session: Session, chosen: Selectors) -> pn.Column:
    """Return the details of one head: window, mean sink attention, and sink attention by position and token."""
    run, layer, head = session.run, chosen.number("layer"), chosen.number("head")
    words = search.vocabulary(run)
    label = f"{session.name}-layer-{layer}-head-{head}"
    mass = quick_look.by_channel_and_effort(run, "mass", layer, head, chosen["task"]).set_index("channel")
    mass = (100 * mass).round(2).reset_index()
    within = search.TokenSelection(**chosen.cell)
    cards: list[Any] = [
        widgets.html(escape(content.about_head(run, layer, head))),
        widgets.table(
            "Mean sink attention (%)", mass, f"{label}-mass", note=f"By channel and effort, {_of_task(chosen)}"
        ),
    ]
    if "sinks" not in run.recorded:
        cards.append(
            widgets.alert("This run recorded only sums of sink attention, so there is no curve by position.", "info")
        )
        return pn.Column(*cards, sizing_mode="stretch_width")

    def position() -> Any:
        rows = search.head_by_position(run, layer, head, within=replace(within, channel=""))
        drawn = draw.position_curve(rows, run.digest, layer, head, theme=session.theme)
        return widgets.figure(drawn, f"{label}-position", rows.reset_index)

    def tokens() -> Any:
        rows = search.head_tokens(run, layer, head, lambda i: search.shown(i, words), within=within)
        title = "Tokens with high sink attention"
        note = "Over-represented among the 10 % of tokens with the highest sink attention; pooled, not tested: "
        note += chosen.description
        if rows.empty:
            return widgets.card(title, widgets.html("<p class='wb-muted'>No token is over-represented.</p>"), note=note)
        return _examples(session, title, note, rows, f"{label}-tokens", "sink")

    return pn.Column(*cards, widgets.later(position), widgets.later(tokens), sizing_mode="stretch_width")
