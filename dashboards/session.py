"""One person at one page: what was chosen, the widgets for it, and the part of a page that a study makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import panel as pn
import xarray as xr

from workbench import registry
from workbench.dashboards import content, widgets
from workbench.dashboards.state import RunRegistry, Selection
from workbench.figures.gallery import Gallery
from workbench.figures.template import ThemeName
from workbench.runs import Run
from workbench.studies import quick_look
from workbench.studies.quick_look import ALL


@dataclass
class Session:
    """One person at one page: the shelf, what was chosen, and where choices are remembered."""

    shelf: RunRegistry
    choice: Selection
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

    def __init__(self, visit: Session, *names: str) -> None:
        self.visit = visit
        known = quick_look.options(visit.run)
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
                self.widgets[name] = widgets.select(name.capitalize(), options[name], value)

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


def box() -> pn.Column:
    """A place on a page whose content changes."""
    return pn.Column(sizing_mode="stretch_width")


def study(visit: Session, name: str, *names: str, above: Sequence[str] = ()) -> list[Any]:
    """A study's figures, one at a time, what was found and how; each when the study is made. above: shown already."""

    def show(found: Mapping[str, xr.Dataset]) -> list[Any]:
        gallery: Gallery = registry.find(name).load_figures().gallery(found)
        gallery = {name: drawing for name, drawing in gallery.items() if name not in above}
        about = [
            widgets.card("What was found", widgets.html(content.findings(found))),
            widgets.card("How is this computed", widgets.html(content.method(found)), collapsed=True),
        ]
        if not gallery:
            return about
        labels = content.figure_names(gallery)
        first = visit.choice.get("figure", list(labels.values()))
        pick = widgets.select("Figure of the study", labels, first, width=420)
        shown = box()

        def draw_it(*_: Any) -> None:
            key = str(pick.value)
            drawing = gallery[key]
            drawn = widgets.guarded(
                lambda: widgets.figure(drawing.draw(theme=visit.theme), f"{visit.name}-{name}-{key}", drawing.table)
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
        widgets.awaited(visit.shelf.study(name, *(names or (visit.name,))), show),
    ]
