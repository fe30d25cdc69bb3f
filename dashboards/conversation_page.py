"""The conversations page: a list that is searched and filtered, and one conversation with what was recorded of it."""

import io
from html import escape
from typing import Any

import numpy as np
import panel as pn
import xarray as xr

from workbench.counting import count_of
from workbench.dashboards import content, search, widgets
from workbench.dashboards.conversation import HEIGHT, VIEW, conversation_file, frame, sentences_of
from workbench.dashboards.conversation_table import metadata_table
from workbench.dashboards.frame_view import view_input
from workbench.dashboards.session import Page, Selectors, Session, box
from workbench.errors import InputError
from workbench.studies.quick_look import ALL

LISTED = 500  # conversations in one page of the list
_NUMBER = "000000000"  # stands for the number of a conversation in an address
READABLE = 160  # tokens of the conversation that is shown first, at most


def transcript(session: Session) -> Page:
    """Return the page: one conversation, coloured by a recorded quantity and replayed token by token.

    Raises:
        InputError: no unit of the run is committed yet.
    """
    if session.run.sequences.empty:
        raise InputError("the run contains no complete conversation yet: wait until the first unit is committed")
    page = _Conversations(session)
    return Page(page.sidebar(), [page.table, page.shown, page.view])


class _Conversations:
    """The widgets of the page and what happens when they change."""

    def __init__(self, session: Session) -> None:
        self.session, self.words = session, search.vocabulary(session.run)
        self.filters = Selectors(session, "task", "effort", "channel")
        if not session.choice.text("channel"):
            self.filters.widgets["channel"].value = ALL
        self.find = pn.widgets.TextInput(
            label="Id, answer or text contains", value=session.choice.text("find"), width=widgets.WIDTH
        )
        orders = {"order of capture": "", "longest first (tokens)": "longest", "shortest first (tokens)": "shortest"}
        if "routing" in session.run.recorded:
            orders["load of the expert"] = "expert"
        self.importance = session.registry.stored(session.name).experiments.get("sentence-importance", {})
        if "sentences" in self.importance:
            orders["measured sentence importance"] = "importance"
        kinds = {"all": "", "correct": "correct", "wrong": "wrong", "not graded": "ungraded", "irregular": "irregular"}
        self.kind = widgets.select("Show", kinds, session.choice.get("kind", list(kinds.values())))
        self.order = widgets.select("Order", orders, session.choice.get("order", list(orders.values())))
        self.pick = widgets.list_box("Conversation", {}, None)
        self.count = widgets.html("")
        self.shown = box()
        self.rows = pn.Column(sizing_mode="stretch_width")
        self.table = widgets.card("Table of conversations", self.rows, collapsed=True)
        self.table.param.watch(lambda _: self.tabulate(), "collapsed")
        self.view = view_input(session, VIEW, self.viewed)
        self.expert = session.choice.text("expert")
        self.matches: dict[str, int] = {}
        self.first = 0  # of the list's page
        linked = session.choice.text("sequence")
        numbers = session.run.sequences.index
        self.linked = int(linked) if linked.isdecimal() and int(linked) in numbers else None
        if linked and self.linked is None:
            session.unknown.append(
                f"The run has no conversation {linked!r}, which the address names: the page shows another one. Its "
                f"conversations have the numbers {numbers[0]} to {numbers[-1]}."
            )
        self.pick.param.watch(lambda _: self.show(), "value")
        self.filters.watch(self.fill, *self.filters.widgets)
        for widget in (self.find, self.order, self.kind):
            widget.param.watch(lambda _: self.fill(), "value")

    def sidebar(self) -> list[Any]:
        """Return the widgets for the sidebar."""
        before, after = _pair("‹ previous", "next ›")
        earlier, later = _pair("« page", "page »")
        before.on_click(lambda _: self.step(-1))
        after.on_click(lambda _: self.step(1))
        earlier.on_click(lambda _: self.turn(-LISTED))
        later.on_click(lambda _: self.turn(LISTED))
        turns = pn.Row(earlier, later, visible=len(self.session.run.sequences) > LISTED)
        share = pn.widgets.FileDownload(
            callback=lambda: io.BytesIO(conversation_file(self.session.run, int(self.pick.value), self.session.theme)),
            filename="conversation.html",
            label="Download this page",
            width=widgets.WIDTH,
            variant="outline",
        )
        row = pn.Row(before, after)
        return [self.find, self.pick, self.count, turns, row, self.kind, self.order, *self.filters.sidebar(), share]

    def fill(self) -> None:
        """Find the conversations again. That of a link stays first chosen, whatever the filters are."""
        self.session.put(find=str(self.find.value), order=str(self.order.value), kind=str(self.kind.value))
        self.pick.loading = True
        matches = widgets.guarded(self._search)
        self.pick.loading = False
        if not isinstance(matches, dict):
            self.shown[:] = [matches]
            return
        linked, self.linked = self.linked, None
        if linked is not None and linked not in matches.values():
            matches = {f"{self.session.run.sequences.loc[linked, 'id']!s} (linked)": linked, **matches}
        self.matches = matches
        self.rows[:] = []  # of the conversations before
        self.tabulate()
        numbers = list(matches.values())
        wanted = linked if linked is not None else self.pick.value
        wanted = wanted if wanted in numbers else self._first(numbers)
        self.first = numbers.index(wanted) // LISTED * LISTED if numbers else 0
        self._list(wanted)
        if not matches:
            text = "No matching conversations. Change the filters or the search text."
            self.shown[:] = [widgets.alert(text, "info")]

    def tabulate(self) -> None:
        """Fill the table with the conversations of the list once it is open."""
        if self.table.collapsed or self.rows.objects:
            return

        def body() -> Any:
            numbers = list(self.matches.values())
            rows, constant, left_out = metadata_table(self.session.run, numbers)
            address = self.session.link("transcript", sequence=_NUMBER)  # made once, as a run can have many
            links = [address.replace(f"sequence={_NUMBER}", f"sequence={number}") for number in numbers]
            texts = [f"The same in all: {', '.join(f'{name} {value}' for name, value in constant.items())}."]
            texts += [f"{count_of(left_out, 'rare field')} of the metadata left out."] if left_out else []
            if len(rows.columns) > widgets.MOST_COLUMNS:
                texts.append(f"{len(rows.columns)} columns: scroll the table to the side.")
            note = " ".join(texts if constant else texts[1:])
            table = widgets.table_content(rows, f"{self.session.name}-conversations", {"conversation": links})
            return pn.Column(widgets.html(f"<p class='wb-under'>{escape(note)}</p>"), table) if note else table

        self.rows[:] = [widgets.guarded(body)]

    def _first(self, numbers: list[int]) -> int | None:
        """Return the conversation that is shown when none is chosen: a short one with an analysis, if the list has one.

        Sorted lists and searches begin with their first conversation.
        """
        if self.order.value or str(self.find.value) or not numbers:
            return next(iter(numbers), None)
        lengths = self.session.run.sequences["length"].to_dict()
        return max((n for n in numbers[:LISTED] if lengths[n] <= READABLE), key=lengths.__getitem__, default=numbers[0])

    def _search(self) -> dict[str, int]:
        expert = (self._number("layer", "n_layers"), self._number("expert", "num_experts"))
        matches = search.conversations(
            self.session.run,
            task=self.filters["task"],
            effort=self.filters["effort"],
            channel=self.filters["channel"],
            text=str(self.find.value),
            expert=expert if self.order.value == "expert" else None,
            kind=str(self.kind.value),
            order=str(self.order.value),
        )
        if self.order.value != "importance":
            return matches
        largest = largest_effects(self.importance["sentences"])
        table = self.session.run.sequences["id"].to_dict()
        measured = [item for item in matches.items() if table[item[1]] in largest]
        return dict(sorted(measured, key=lambda item: -largest[table[item[1]]]))

    def _number(self, name: str, size: str) -> int:
        return int(self.session.choice.get(name, [str(i) for i in range(self.session.run.model[size])]))

    def _list(self, wanted: int | None) -> None:
        page = dict(list(self.matches.items())[self.first : self.first + LISTED])
        total, all_ = len(self.matches), len(self.session.run.sequences)
        shown = f"{self.first + bool(total):,}–{min(self.first + LISTED, total):,} of {total:,} shown"
        self.count.object = f"<span class='wb-muted'>{shown} ({all_:,} in the run)</span>"
        self.pick.param.update(options=page, value=wanted)

    def turn(self, by: int) -> None:
        """Show another page of the list."""
        first = self.first + by
        if 0 <= first < len(self.matches):
            self.first = first
            self._list(list(self.matches.values())[first])

    def step(self, by: int) -> None:
        """Show the next conversation of the list, or the one before."""
        numbers = list(self.matches.values())
        if not numbers:
            return
        at = (numbers.index(self.pick.value) + by) % len(numbers)
        self.first = at // LISTED * LISTED
        self._list(numbers[at])

    def show(self) -> None:
        """Show the chosen conversation; what its frame had chosen of another is forgotten, but for the colouring."""
        if self.pick.value is None:
            return
        number, choice = int(self.pick.value), self.session.choice
        before = choice.text("sequence")
        if before != str(number):
            self.session.put(sequence=str(number), **({"position": "", "pin": ""} if before else {}))
        view = {name: choice.text(name) for name in (*VIEW, "find") if choice.text(name)}
        sentences = sentences_of(self.importance, str(self.session.run.sequences["id"].to_dict()[number]))

        def body() -> Any:
            text = frame(self.session.run, number, self.words, self.session.theme, view, sentences)
            return pn.pane.HTML(text, height=HEIGHT + 10, sizing_mode="stretch_width")

        link = self.session.link("attention", sequence=str(number))
        about = f"{content.about_sequence(self.session.run, number)}<a href='{escape(link)}'>Attention patterns</a>"
        model = self.session.registry.model(self.session.name) or "MODEL"
        if command := content.graph_command(self.session.run, number, model):
            about += (
                "<details><summary>Why this token?</summary><p>This command explains the first token of the final "
                "answer by an attribution graph, which the page <i>Why this token</i> shows then; <code>--at N</code> "
                f"explains token N of what was generated.</p><pre>{escape(command)}</pre></details>"
            )
        self.shown[:] = [widgets.html(about), widgets.guarded(body)]

    def viewed(self, view: dict[str, str]) -> None:
        """Sort the list again if it is sorted by the load of the expert that was chosen in the frame."""
        if self.order.value == "expert" and view.get("expert", self.expert) != self.expert:
            self.expert = view["expert"]
            self.fill()


def largest_effects(sentences: xr.Dataset) -> dict[str, float]:
    """Return the largest absolute effect of a sentence for each conversation by its id; 0 if none was measured."""
    effects = np.nan_to_num(np.abs(sentences["effect"].values.astype(float)))
    largest: dict[str, float] = {}
    for id, effect in zip(sentences["conversation"].values.astype(str).tolist(), effects.tolist(), strict=True):
        largest[id] = max(effect, largest.get(id, 0.0))
    return largest


def _pair(*texts: str) -> list[pn.widgets.Button]:
    """Return two buttons that are together as wide as a widget of the sidebar."""
    margins = ((5, 5, 5, 10), (5, 10, 5, 5))
    return [
        pn.widgets.Button(label=text, width=widgets.WIDTH // 2 - 5, margin=margin)
        for text, margin in zip(texts, margins, strict=True)
    ]
