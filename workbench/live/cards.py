"""Cards of interventions: what each does, on which tokens, and how strongly."""

import re
from collections.abc import Callable
from html import escape
from typing import Any

import panel as pn

from workbench.dashboards.theme import CARD_CSS
from workbench.errors import InputError
from workbench.research.recipe import CELL_KINDS, DIRECTIONS, Intervention, Scope

TITLES = {
    "forbid": "Forbid experts",
    "force": "Force experts",
    "reweight": "Reweight experts",
    "scale_sinks": "Scale sinks",
    "steer": "Steer along a direction",
    "knockout": "Knock out attention",
}
_CHANNELS = ["prompt", "analysis", "commentary", "final", "frame"]
_CELL = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def cells_of(text: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of a text such as "1:5, 2:0".

    Raises:
        InputError: a part is not LAYER:EXPERT.
    """
    found = []
    for part in filter(None, re.split(r"[\s,]+", text)):
        match = _CELL.fullmatch(part)
        if match is None:
            raise InputError(f"experts {part!r}: expected LAYER:EXPERT, as in 1:5 2:0")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def cells_text(cells: tuple[tuple[int, int], ...]) -> str:
    """Return pairs of layer and expert as a text that `cells_of` reads."""
    return " ".join(f"{layer}:{expert}" for layer, expert in cells)


def layers_of(text: str) -> tuple[int, ...]:
    """Return the layers of a text such as "0-2, 5".

    Raises:
        InputError: a part is neither a number nor a range.
    """
    found: list[int] = []
    for part in filter(None, re.split(r"[\s,]+", text)):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first > 1000:
            raise InputError(f"layers {part!r}: expected numbers or ranges, as in 0-2 5")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


class InterventionCard:
    """The widgets of one intervention."""

    def __init__(self, one: Intervention, remove: Callable[["InterventionCard"], None]) -> None:
        self.kind = one.kind
        self._cells = pn.widgets.TextInput(label="Experts (layer:expert)", value=cells_text(one.cells))
        self._layers = pn.widgets.TextInput(label="Layers", value=" ".join(map(str, one.layers)))
        self._strength = pn.widgets.FloatInput(label="Strength", value=one.strength, step=0.25, width=100)
        self._toward, self._away = (
            pn.widgets.Select(label=label, options=list(DIRECTIONS), value=value, width=120)
            for label, value in (("Toward the mean of", one.toward), ("Away from", one.away))
        )
        self._keys = pn.widgets.CheckBoxGroup(options=_CHANNELS, value=list(one.keys.channel), inline=True)
        self._channels = pn.widgets.CheckBoxGroup(options=_CHANNELS, value=list(one.scope.channel), inline=True)
        self._roles, self._other_keys = one.scope.role, one.keys  # kept as they are: the card has no widgets for them
        self._start = pn.widgets.IntInput(label="From position", value=one.scope.start, start=0, width=110)
        stop = "" if one.scope.stop is None else str(one.scope.stop)
        self._stop = pn.widgets.TextInput(label="To position", value=stop, placeholder="end", width=110)
        self._remove = pn.widgets.Button(label="Remove", width=80, variant="outline")
        self._remove.on_click(lambda _: remove(self))
        self.view = pn.Card(
            *self._rows(),
            title=TITLES[one.kind],
            sizing_mode="stretch_width",
            stylesheets=[CARD_CSS],
            margin=(4, 0),
        )

    def _rows(self) -> list[Any]:
        label = "<label>{}</label>".format
        rows: list[Any] = [self._cells if self.kind in CELL_KINDS else self._layers]
        if self.kind == "steer":
            rows.append(pn.Row(self._toward, self._away))
        if self.kind == "knockout":
            rows += [pn.pane.HTML(label("Tokens that are hidden (none: all)"), margin=(4, 10, 0, 10)), self._keys]
        name = "Acts on channels (none: all)" if self.kind != "knockout" else "From queries in (none: all)"
        rows += [pn.pane.HTML(label(escape(name)), margin=(4, 10, 0, 10)), self._channels]
        numbers = [self._start, self._stop]
        if self.kind in ("reweight", "scale_sinks", "steer"):
            numbers.append(self._strength)
        return [*rows, pn.Row(*numbers), self._remove]

    def intervention(self) -> Intervention:
        """Return the intervention that the widgets describe.

        Raises:
            InputError: a field cannot be read.
        """
        text = str(self._stop.value).strip()
        if text and not text.isdecimal():
            raise InputError(f"to position {text!r}: expected a whole number, or nothing for the end")
        scope = Scope(
            tuple(self._channels.value), self._roles, int(self._start.value or 0), int(text) if text else None
        )
        keys = Scope(tuple(self._keys.value), self._other_keys.role, self._other_keys.start, self._other_keys.stop)
        cells, layers = cells_of(self._cells.value), layers_of(self._layers.value)
        of_cells, knockout, steers = self.kind in CELL_KINDS, self.kind == "knockout", self.kind == "steer"
        return Intervention(
            self.kind,
            cells=cells if of_cells else (),
            layers=() if of_cells else layers,
            strength=float(self._strength.value) if self.kind in ("reweight", "scale_sinks", "steer") else 1.0,
            toward=str(self._toward.value) if steers else "final",
            away=str(self._away.value) if steers else "analysis",
            scope=scope,
            keys=keys if knockout else Scope(),
        )
