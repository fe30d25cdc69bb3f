"""Cards of interventions: the kind, the tokens and the strength of each."""

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import panel as pn

from workbench.dashboards.theme import CARD_CSS, PARTS_CSS, note
from workbench.errors import InputError
from workbench.harmony.labels import ROLES
from workbench.harmony.messages import EFFORTS
from workbench.live.number_field import NumberField
from workbench.research.intervention import (
    CELL_KINDS,
    DIRECTIONS,
    FACTOR_KINDS,
    HEAD_KINDS,
    MAX_STRENGTH,
    STRENGTH_KINDS,
    Intervention,
    Scope,
    plain_fields,
    read_intervention,
)
from workbench.research.steering_sources import SteeringSources

TITLES = {
    "forbid": "Forbid experts",
    "force": "Force experts",
    "reweight": "Reweight experts",
    "scale_sinks": "Scale sinks",
    "scale_heads": "Ablate or scale heads",
    "steer": "Steer along a direction",
    "vector": "Steer along a vector",
    "feature": "Steer along a feature",
    "patch": "Patch from a prompt",
    "knockout": "Knock out attention",
}
_CHANNELS = ["prompt", "analysis", "commentary", "final", "frame"]
# choices that do not fit beside each other go to the next line
_WRAPPED_CSS = (
    ".bk-input-group{flex-wrap:wrap;column-gap:5px}.bk-input-group>:not(:first-child){margin-left:0!important}"
)
_SAME_EFFORT = "same"
_NARROW = 190  # pixels of a field that has others beside it
_MAX_POSITION = 10_000_000  # no context is longer
_MAX_FEATURE = 100_000_000
_CELL = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def cells_of(text: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of a text such as "1:5, 2:0".

    Raises:
        InputError: a part is not LAYER:EXPERT.
    """
    cells = []
    for part in filter(None, re.split(r"[\s,]+", text)):
        match = _CELL.fullmatch(part)
        if match is None:
            raise InputError(f"experts {part[:40]!r}: expected LAYER:EXPERT, as in 1:5 2:0")
        cells.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(cells))


def cells_text(cells: tuple[tuple[int, int], ...]) -> str:
    """Return pairs of layer and expert as a text that `cells_of` reads."""
    return " ".join(f"{layer}:{expert}" for layer, expert in cells)


def layers_of(text: str, what: str = "layers") -> tuple[int, ...]:
    """Return the numbers of a text such as "0-2, 5". what: what they count, for the error.

    Raises:
        InputError: a part is neither a number nor a range.
    """
    numbers: list[int] = []
    for part in filter(None, re.split(r"[\s,]+", text)):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first > 1000:
            raise InputError(f"{what} {part[:40]!r}: expected numbers or ranges, as in 0-2 5")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def source_names(kind: str, sources: SteeringSources) -> list[str]:
    """Return the vectors or autoencoders that an intervention of a kind can name."""
    return sorted({"vector": sources.vectors, "feature": sources.saes}.get(kind, {}))


def new_intervention(kind: str, cells: tuple[tuple[int, int], ...], n_layers: int, effort: str) -> Intervention:
    """Return the intervention that the card of a kind begins with.

    cells: the selected experts. effort: that of the prompt.

    Raises:
        InputError: the kind needs experts, and none are selected.
    """
    if kind in CELL_KINDS and not cells:
        raise InputError("no experts are selected: click cells of the map")
    middle = n_layers // 2
    layers = (middle,) if kind in ("steer", "vector", "patch", "scale_heads") else tuple(range(middle + 1))
    # what is asked most: does the final answer need attention to the analysis, or this effort
    asked: dict[str, dict[str, Any]] = {
        "knockout": {"scope": Scope(channel=("final",)), "keys": Scope(channel=("analysis",))},
        "patch": {"source_effort": "low" if effort == "high" else "high"},
        "scale_heads": {"heads": (0,), "strength": 0.0},
        **{factor: {"strength": 0.5} for factor in ("reweight", "scale_sinks")},
    }
    return Intervention(
        kind,
        cells=cells if kind in CELL_KINDS else (),
        layers=() if kind in (*CELL_KINDS, "feature") else layers,
        **asked.get(kind, {}),
    )


class ScopeWidgets:
    """The widgets of a scope: channels, roles, and a range of positions."""

    def __init__(self, scope: Scope, what: str) -> None:
        self._channels, self._roles = (
            pn.widgets.CheckBoxGroup(
                options=list(options),
                value=list(value),
                inline=True,
                stylesheets=[_WRAPPED_CSS],
                sizing_mode="stretch_width",
            )
            for options, value in ((_CHANNELS, scope.channel), (ROLES, scope.role))
        )
        self._start, self._stop = (
            NumberField(label, value, low=0, high=_MAX_POSITION, integer=True, empty=empty, placeholder=placeholder)
            for label, value, empty, placeholder in (
                ("From position", scope.start, 0, "0"),
                ("To position", scope.stop, _MAX_POSITION, "end"),
            )
        )
        self.numbers = [self._start.widget, self._stop.widget]
        self.rows = [
            *(_labelled(f"{what}: channels (none: all)", self._channels)),
            *(_labelled(f"{what}: roles (none: all)", self._roles)),
        ]

    def scope(self) -> Scope:
        """Return the scope that the widgets describe.

        Raises:
            InputError: a position is not a whole number, or the last one is not above the first.
        """
        start, stop = int(self._start.read()), int(self._stop.read())
        if stop <= start:
            raise InputError(f"To position {stop:,}: expected more than From position, {start:,}")
        channels, roles = tuple(self._channels.value), tuple(self._roles.value)
        return Scope(channels, roles, start, None if stop == _MAX_POSITION else stop)


def _labelled(text: str, widget: Any) -> list[Any]:
    return [pn.pane.HTML(f"<label>{escape(text)}</label>", margin=(4, 10, 0, 10)), widget]


class InterventionCard:
    """The widgets of one intervention. names: of the vectors or autoencoders that it can name as its source.

    opened: is called with the card when it is unfolded.
    """

    def __init__(
        self,
        one: Intervention,
        remove: Callable[["InterventionCard"], None],
        names: Sequence[str] = (),
        *,
        opened: Callable[["InterventionCard"], None] = lambda _: None,
    ) -> None:
        self.kind = one.kind
        self._cells = pn.widgets.TextInput(label="Experts (layer:expert)", value=cells_text(one.cells))
        self._layers = pn.widgets.TextInput(
            label="Layers" if one.kind != "feature" else "Layers (none: where the SAE was trained)",
            value=" ".join(map(str, one.layers)),
            width=_NARROW if one.kind != "feature" else 2 * _NARROW,
        )
        self._heads = pn.widgets.TextInput(
            label="Heads (none: all)", value=" ".join(map(str, one.heads)), width=_NARROW
        )
        low = 0 if one.kind in FACTOR_KINDS else -MAX_STRENGTH
        self._strength = NumberField("Strength", one.strength, low=low, high=MAX_STRENGTH, width=100)
        self._toward, self._away = (
            pn.widgets.Select(label=label, options=list(DIRECTIONS), value=value, width=120)
            for label, value in (("Toward the mean of", one.toward), ("Away from", one.away))
        )
        self._source = self._source_widget(one, names)
        self._effort = pn.widgets.Select(
            label="At effort", options=[_SAME_EFFORT, *EFFORTS], value=one.source_effort or _SAME_EFFORT, width=110
        )
        self._feature = NumberField("Feature", one.feature, low=0, high=_MAX_FEATURE, integer=True)
        self.scope = ScopeWidgets(one.scope, "From queries" if one.kind == "knockout" else "Acts on")
        self.keys = ScopeWidgets(one.keys, "Hidden tokens")
        self._problem = pn.pane.HTML("", stylesheets=[PARTS_CSS], sizing_mode="stretch_width")
        self._remove = pn.widgets.Button(label="Remove", width=80, variant="outline")
        self._remove.on_click(lambda _: remove(self))
        self.view = pn.Card(
            *self._rows(),
            title=TITLES[one.kind],
            sizing_mode="stretch_width",
            stylesheets=[CARD_CSS],
            margin=(4, 0),
        )
        self.view.param.watch(self._name_folded, "collapsed")
        self.view.param.watch(lambda event: None if event.new else opened(self), "collapsed")

    def fold(self) -> None:
        """Fold the card to one line, which states what the intervention does."""
        self.view.collapsed = True

    def _name_folded(self, *_: Any) -> None:
        text = self.title
        if self.view.collapsed:
            try:
                described = self.intervention().describe()
                text = described[:1].upper() + described[1:]
            except InputError as error:
                text = f"{self.title}: {error}"
        self.view.title = escape(text)  # the title of a card is HTML

    @staticmethod
    def _source_widget(one: Intervention, names: Sequence[str]) -> Any:
        if one.kind == "patch":
            return pn.widgets.TextAreaInput(
                label="Other user message (empty: the same)",
                value=one.source,
                rows=2,
                max_length=100_000,
                sizing_mode="stretch_width",
            )
        label = "SAE" if one.kind == "feature" else "Vector"
        options = list(dict.fromkeys([*names, *([one.source] if one.source else [])]))
        value = one.source or next(iter(options), None)
        return pn.widgets.Select(label=label, options=options, value=value, width=200)

    def _rows(self) -> list[Any]:
        first: list[Any] = [self._cells if self.kind in CELL_KINDS else self._layers]
        first += [self._heads] if self.kind in HEAD_KINDS else []
        first += [self._strength.widget] if self.kind in STRENGTH_KINDS else []
        rows: list[Any] = [pn.FlexBox(*first)]
        if self.kind == "steer":
            rows.append(pn.Row(self._toward, self._away))
        if self.kind in ("vector", "feature", "patch"):
            more = {"feature": [self._feature.widget], "patch": [self._effort]}.get(self.kind, [])
            rows.append(pn.FlexBox(self._source, *more))
        if self.kind == "knockout":
            rows += [*self.keys.rows, pn.Row(*self.keys.numbers)]
        last = pn.FlexBox(*self.scope.numbers, self._remove, align_items="flex-end")
        return [*rows, *self.scope.rows, last, self._problem]

    @property
    def title(self) -> str:
        """Return what the card is called on the page."""
        return TITLES[self.kind]

    @property
    def has_problem(self) -> bool:
        """Return whether the card shows why the intervention cannot be used."""
        return bool(self._problem.object)

    def show_problem(self, text: str, kind: str = "danger") -> None:
        """Show on the card why the intervention cannot be used, or nothing for an empty text. kind: of the note."""
        self._problem.object = note(text, kind) if text else ""
        if text:
            self.view.collapsed = False

    def intervention(self) -> Intervention:
        """Return the intervention that the widgets describe.

        Raises:
            InputError: a field cannot be read, or the fields do not fit each other.
        """
        kind, effort = self.kind, str(self._effort.value)
        one = Intervention(
            kind,
            cells=cells_of(self._cells.value) if kind in CELL_KINDS else (),
            layers=() if kind in CELL_KINDS else layers_of(self._layers.value),
            heads=layers_of(self._heads.value, "heads") if kind in HEAD_KINDS else (),
            strength=self._strength.read() if kind in STRENGTH_KINDS else 1.0,
            toward=str(self._toward.value) if kind == "steer" else "final",
            away=str(self._away.value) if kind == "steer" else "analysis",
            source=str(self._source.value or "") if kind in ("vector", "feature", "patch") else "",
            source_effort=effort if kind == "patch" and effort != _SAME_EFFORT else "",
            feature=int(self._feature.read()) if kind == "feature" else 0,
            scope=self.scope.scope(),
            keys=self.keys.scope() if kind == "knockout" else Scope(),
        )
        return read_intervention(plain_fields(one))  # the same checks as for a file
