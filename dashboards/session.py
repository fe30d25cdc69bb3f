"""The state of one browser session on one page, its selectors, and the section that shows a study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import panel as pn
import xarray as xr

from workbench import registry
from workbench.dashboards import content, python_code, widgets
from workbench.dashboards.difference_table import difference_table
from workbench.dashboards.figure_labels import figure_names
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.figures.gallery import Gallery
from workbench.figures.template import ThemeName
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.runs import Run
from workbench.runs.schema import SWITCHES
from workbench.studies import quick_look
from workbench.studies.quick_look import ALL

_LISTED = 12  # values that a note lists; of more, which are numbers, the first and the last
_WITHOUT_OPTIONS = (*SWITCHES, "neurons")  # what `workbench capture --record` takes by its name alone


@dataclass
class Session:
    """The state of one browser session on one page: the runs, the selection, and where the selection is stored."""

    registry: RunRegistry
    choice: Selection
    remember: Callable[[], None]  # called when the choice has changed
    address: Callable[[str, str], str] = "./{}?{}".format  # of a page and a query
    name: str = field(init=False)  # of the run
    unknown: list[str] = field(default_factory=list)  # a sentence for each value of the address that there is not

    def __post_init__(self) -> None:
        asked = self.choice.text("run")
        self.name = self.choice.get("run", self.registry.names)
        if asked != self.name:
            self.choice.put(run="")
        if asked and asked != self.name:
            self.unknown.append(
                f"This dashboard has no run {asked!r}, which the address names: it shows {self.name}. Its runs are "
                f"{', '.join(self.registry.names)}."
            )

    def known(self, name: str, values: Sequence[str], default: str | None = None) -> str:
        """Return the selected value of this name; of one that the run does not have, the page shows a note."""
        value, asked = self.choice.get(name, values, default), self.choice.text(name)
        if asked and asked != value:
            listed = ", ".join(values) if len(values) <= _LISTED else f"{values[0]} to {values[-1]}"
            self.unknown.append(
                f"The run has no {name} {asked!r}, which the address names: the page shows {value}. Choose among "
                f"{listed}."
            )
        return value

    @property
    def run(self) -> Run:
        """Return the selected run in its current state."""
        return self.other_run(self.name)

    @property
    def exclude(self) -> str:
        """Return the flag of the sequences that are left out, or ""."""
        return self.choice.get("exclude", ("", *SEQUENCE_FLAGS))

    def other_run(self, name: str) -> Run:
        """Return a run by name, without the sequences that are left out."""
        return self.registry.run(name, self.exclude)

    @property
    def theme(self) -> ThemeName:
        """Return the theme, light by default."""
        return "dark" if self.choice.text("theme") == "dark" else "light"

    def link(self, page: str, **chosen: str) -> str:
        """Return the address of a page with the selection, some of it replaced."""
        return self.address(page, self.choice.query(figure="", measure="", **chosen))

    def put(self, **chosen: str) -> None:
        """Change the selection and store it in the address."""
        self.choice.put(**chosen)
        self.remember()


@dataclass(frozen=True)
class Page:
    """The content of a page: sidebar and main area."""

    sidebar: list[Any]
    main: list[Any]


class Selectors:
    """The selectors that pages share: channel, effort, task, layer, expert and head."""

    def __init__(self, session: Session, *names: str) -> None:
        self.session, self._several = session, False
        self._shows: list[Callable[[], None]] = []
        known = quick_look.options(session.run)
        model = session.run.model
        options = {
            **known,
            "layer": [str(i) for i in range(model["n_layers"])],
            "expert": [str(i) for i in range(model["num_experts"])],
            "head": [str(i) for i in range(model["n_heads"])],
        }
        self.widgets: dict[str, Any] = {}
        for name in names:
            first = "analysis" if name == "channel" and session.choice.text("channel") == "" else None
            value = session.known(name, options[name], first)
            if name == "effort":
                self.widgets[name] = pn.widgets.RadioButtonGroup(label="Effort", options=options[name], value=value)
            else:
                self.widgets[name] = widgets.select(name.capitalize(), options[name], value)

    def __getitem__(self, name: str) -> str:
        return str(self.widgets[name].value) if name in self.widgets else ALL

    def number(self, name: str) -> int:
        """Return the selected number of a layer, expert or head."""
        return int(self[name])

    @property
    def cell(self) -> dict[str, str]:
        """Return the selected channel, effort and task."""
        return {name: self[name] for name in ("channel", "effort", "task")}

    @property
    def description(self) -> str:
        """Return the selected channel, effort and task as a text."""
        return ", ".join(value for value in self.cell.values() if value != ALL) or "all content"

    def select(self, **values: str) -> None:
        """Change several selectors at once: the address changes once, and so does what shows them."""
        self._several = True
        for name, value in values.items():
            self.widgets[name].value = value
        self._several = False
        self._store()
        for show in self._shows:
            show()

    def _store(self) -> None:
        self.session.put(**{name: self[name] for name in self.widgets})

    def sidebar(self) -> list[Any]:
        """Return the widgets for the sidebar."""
        rows: list[Any] = []
        for name, widget in self.widgets.items():
            rows += (
                [pn.pane.HTML("<label>Effort</label>", margin=(5, 10, 0, 10)), widget] if name == "effort" else [widget]
            )
        return rows

    def watch(self, show: Callable[[], None], *names: str) -> None:
        """Call `show` now and whenever one of the named selectors changes, after the selection was stored."""

        def changed(*_: Any) -> None:
            if self._several:
                return
            self._store()
            show()

        self._shows.append(show)
        for name in names:
            self.widgets[name].param.watch(changed, "value")
        changed()


def missing_record(record: registry.Record, run: Run) -> Any:
    """Return what a page shows if the run lacks what a study needs: how to record it; None if nothing is missing."""
    try:
        record.check_recorded(run)
    except InputError as error:
        remedy = str(error).rpartition(": ")[2].removeprefix("capture again with ")
        return not_recorded(run, " and ".join(record.requires), remedy)
    return None


def not_recorded(run: Run, needed: str, remedy: str) -> Any:
    """Return what a page shows if a run lacks a quantity: the command that records it, and again what the run has.

    remedy: options of `workbench capture`, as "--record sinks".
    """
    again = [name for name in run.recorded if name in _WITHOUT_OPTIONS and f"--record {name}" not in remedy]
    options = " ".join([*(f"--record {name}" for name in again), remedy])
    text = f"The run has {', '.join(run.recorded) or 'nothing'}. Capture the same transcripts into another run:"
    model = "nano" if run.checkpoint["name"] == "nano" else "MODEL"
    command = f"workbench capture {model} TRANSCRIPTS.jsonl RUN.zarr {options}"
    return widgets.empty_state(f"This run has no recorded {needed}", text, command)


def box() -> pn.Column:
    """Return an empty column whose content changes later."""
    return pn.Column(sizing_mode="stretch_width")


def study(
    session: Session,
    name: str,
    *names: str,
    above: Sequence[str] = (),
    heading: str = "Statistical tests",
    first: bool = False,
) -> list[Any]:
    """Return the section of a study: figures, findings and methods. `above` names figures that are shown already.

    first: the page begins with this section, so that its findings are shown with the page and not after it.
    """

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        gallery: Gallery = record.load_figures().gallery(results)
        gallery = {name: drawing for name, drawing in gallery.items() if name not in above}
        answer = widgets.card("Findings", widgets.html(content.findings(results)))
        method = widgets.card("Methods", widgets.html(content.method(results)), collapsed=True)
        if not gallery:
            return [answer, method]
        labels = figure_names(gallery)
        first = session.choice.get("figure", list(labels.values()))
        pick = widgets.wide_select("Figure", labels, first)
        shown, rows = box(), box()

        def drawn() -> pn.Column:
            key = str(pick.value)
            code = python_code.study_figure(record, runs, key, session.exclude, session.theme)
            return widgets.figure(gallery[key].draw(theme=session.theme), label(key), gallery[key].table, python=code)

        def listed() -> pn.Column:
            key = str(pick.value)
            return pn.Column(*difference_table(session, gallery[key], label(key)), sizing_mode="stretch_width")

        def draw_it(*_: Any) -> None:
            shown[:], rows[:] = [widgets.deferred(drawn)], [widgets.deferred(listed)]

        def picked(*_: Any) -> None:
            session.put(figure=str(pick.value))
            draw_it()

        draw_it()
        pick.param.watch(picked, "value")
        return [pick, shown, answer, rows, method]

    def label(figure: str) -> str:
        return f"{session.name}-{name}-{figure}"

    record, runs = registry.find(name), [session.other_run(one) for one in names or (session.name,)]
    ask = session.registry.study(name, *(names or (session.name,)), exclude=session.exclude)
    title = widgets.html(f"<h2>{escape(heading)}</h2><p class='wb-under'>All efforts and tasks</p>")
    return [title, widgets.awaited(ask, show) if first else widgets.deferred(lambda: widgets.awaited(ask, show))]
