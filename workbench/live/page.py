"""The live page of one browser session: prompt, map of experts, interventions, both answers, and the recipe."""

from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any

import panel as pn

from workbench.counting import count_of
from workbench.dashboards import widgets
from workbench.dashboards.theme import CARD_CSS, PARTS_CSS, note
from workbench.errors import InputError
from workbench.figures.template import ThemeName
from workbench.harmony.messages import EFFORTS
from workbench.live.arrangement import arranged
from workbench.live.cards import TITLES, InterventionCard, new_intervention, source_names
from workbench.live.experiment import Answer, Experiment, final_answer
from workbench.live.expert_map import ExpertMap, shares_by_cell
from workbench.live.job_queue import Job, State
from workbench.live.model_server import ModelServer, Viewer
from workbench.live.number_field import NumberField
from workbench.live.recipe_card import RecipeCard
from workbench.live.recipe_gallery import RecipeGallery
from workbench.live.rendering import (
    ANSWER_CSS,
    answer_html,
    cut_off_sentence,
    difference_html,
    history_html,
    speed_html,
)
from workbench.research.intervention import CELL_KINDS, Intervention
from workbench.research.recipe import Recipe

REFRESH_MS = 120
_PRIMARY_CSS = """
.bk-btn,.bk-btn:hover{background:var(--wb-accent)!important;color:var(--wb-on-accent)!important;font-weight:600}
"""
# what the answers and their comparison show before there are any
_NO_ANSWER = (
    "Press Run to generate an answer. The map shows the experts of each new token.",
    "Add an intervention and press Run to generate a second answer to the same prompt with the same seed.",
)
_NO_COMPARISON = "No comparison yet. Add an intervention and press Run."
_COMPARISON_LATER = "The comparison follows when both answers are complete."
_UNMATCHED = "No token of the edited answer or its prompt is in the scope: the intervention changed nothing."
_FEW_EXPERTS = 20  # with more, the map of experts needs about half of the width
_EDIT_THERE = "The answer is in the field “Beginning of the answer”. Edit it there and press Run."


class LivePage:
    """The widgets of the page and what they do. remember: stores a recipe in the address."""

    def __init__(
        self,
        server: ModelServer,
        recipe: Recipe,
        theme: ThemeName,
        remember: Callable[[Recipe], None],
        problem: str = "",
    ) -> None:
        self._server, self._theme, self._remember = server, theme, remember
        self.viewer = Viewer(server)
        self._job: Job | None = None
        self._experiment: Experiment | None = None
        self._notes: list[str] = []
        self._shown: tuple[Any, ...] = ()
        self._cards: list[InterventionCard] = []
        self._run_cards: list[InterventionCard] = []  # those of the run that is shown
        self._history: tuple[tuple[str, str], ...] = ()
        self._continued = ""  # the beginning that Continue made: another user message removes it
        self._make_widgets()
        folder = server.recipes
        self._gallery = None if folder is None else RecipeGallery(folder, self._load_saved)
        if self._gallery is not None and recipe.interventions:  # of a link: nobody came for the list
            self._gallery.view.collapsed = True
        self._fill(recipe)
        if problem:
            self._status.object = note(problem, "danger")

    def _make_widgets(self) -> None:
        cfg, limits, wide = self._server.model.cfg, self._server.limits, {"sizing_mode": "stretch_width"}
        self._user = pn.widgets.TextAreaInput(label="User message", rows=3, max_length=100_000, **wide)
        self._developer = pn.widgets.TextAreaInput(label="Developer message", rows=2, max_length=100_000, **wide)
        self._effort = pn.widgets.RadioButtonGroup(label="Reasoning effort", options=list(EFFORTS), value="medium")
        self._begin = pn.widgets.TextAreaInput(label="Beginning of the answer", rows=3, max_length=100_000, **wide)
        self._expected = pn.widgets.TextInput(label="Known answer", max_length=10_000, **wide)
        self._more = pn.Card(
            self._developer,
            self._begin,
            self._expected,
            title="More prompt fields",
            collapsed=True,
            stylesheets=[CARD_CSS],
            margin=(4, 6),
            **wide,
        )
        self._turns = pn.pane.HTML("", stylesheets=[PARTS_CSS, ANSWER_CSS], **wide)
        self._next = pn.widgets.Button(label="Next turn", width=110)
        self._undo = pn.widgets.Button(label="Remove the last turn", width=180, visible=False)
        self._temperature = NumberField("Temperature", 0, low=0, high=10, width=100)
        self._seed = NumberField("Seed", 0, low=0, high=2**31 - 1, integer=True, width=100)
        self._tokens = NumberField("New tokens", 1, low=1, high=limits.max_new_tokens, integer=True, width=100)
        self._samples = NumberField("Samples", 1, low=1, high=limits.max_samples, integer=True, width=90)
        self._run, self._stop, self._continue = (
            pn.widgets.Button(label=text, width=width, color=colour)
            for text, width, colour in (("Run", 90, "primary"), ("Stop", 80, "default"), ("Continue", 100, "default"))
        )
        self._run.stylesheets = [_PRIMARY_CSS]
        self._edit = pn.widgets.Button(label="Edit the answer", width=140)
        self._status = pn.pane.HTML("", stylesheets=[PARTS_CSS], **wide)
        load = [[0.0] * cfg.num_experts for _ in range(cfg.n_layers)]
        self._map = ExpertMap(load=shares_by_cell(load, cfg), sizing_mode="stretch_width", margin=(6, 10))
        about = "Rows: layers. Columns: experts. The colour is the expert load over the tokens so far."
        self._map_title = pn.pane.HTML(_muted(about), stylesheets=[PARTS_CSS], **wide)
        self._add = {
            kind: pn.widgets.Button(label=title, variant="outline", margin=3)
            for kind, title in TITLES.items()
            if kind not in ("vector", "feature") or source_names(kind, self._server.sources)
        }
        self._add_problem = pn.pane.HTML("", stylesheets=[PARTS_CSS], **wide)
        self._list = pn.Column(sizing_mode="stretch_width")
        css = [PARTS_CSS, ANSWER_CSS]
        self._answers = [pn.pane.HTML(_muted(text), stylesheets=css, **wide) for text in _NO_ANSWER]
        self._comparison = pn.pane.HTML(_muted(_NO_COMPARISON), stylesheets=css, **wide)
        self._recipe_card = RecipeCard(self.recipe, self._load_recipe, self._finished, self._server.recipes)
        self._connect()

    def _connect(self) -> None:
        self._run.on_click(lambda _: self.run())
        self._stop.on_click(lambda _: self.viewer.leave())
        self._continue.on_click(lambda _: self.continue_answer())
        self._edit.on_click(lambda _: self.edit_answer())
        self._next.on_click(lambda _: self.next_turn())
        self._undo.on_click(lambda _: self._put_history(self._history[:-1]))
        for kind, button in self._add.items():
            button.on_click(lambda _, kind=kind: self._add_clicked(kind))
        self._user.param.watch(lambda _: self._forget_continued(), "value")

    def main(self) -> list[Any]:
        """Return the parts of the main area."""
        prompt = pn.Column(
            self._turns,
            self._user,
            pn.Row(pn.pane.HTML("<label>Reasoning effort</label>", margin=(10, 0, 0, 10)), self._effort),
            self._more,
            pn.FlexBox(*(field.widget for field in (self._temperature, self._seed, self._tokens, self._samples))),
            sizing_mode="stretch_width",
        )
        controls = pn.Column(
            pn.FlexBox(self._run, self._stop, self._continue, self._edit, self._next, self._undo),
            self._status,
            sizing_mode="stretch_width",
        )
        experts = pn.Column(
            self._map_title,
            self._map,
            widgets.html('<p class="wb-muted">Click cells to select experts, then add an intervention.</p>'),
            pn.FlexBox(*self._add.values(), margin=(0, 7, 8, 7)),
            self._add_problem,
            self._list,
            sizing_mode="stretch_width",
        )
        sides = [
            widgets.card(title, pane)
            for title, pane in zip(("Original answer", "Edited answer"), self._answers, strict=True)
        ]
        return [
            arranged(
                [*([self._gallery.view] if self._gallery else []), widgets.card("Prompt", prompt)],
                [controls, widgets.beside(*sides, width=250), widgets.card("Difference", self._comparison)],
                [widgets.card("Experts and interventions", experts)],
                wide_map=self._server.model.cfg.num_experts > _FEW_EXPERTS,
            ),
            widgets.card("Recipe", self._recipe_card.view()),
        ]

    def recipe(self) -> Recipe:
        """Return the recipe that the widgets describe.

        Raises:
            InputError: a field cannot be read.
        """
        recipe = Recipe(
            user=str(self._user.value),
            developer=str(self._developer.value),
            effort=str(self._effort.value),
            begin=str(self._begin.value),
            history=self._history,
            expected=str(self._expected.value),
            model=self._server.name,
            temperature=self._temperature.read(),
            seed=int(self._seed.read()),
            max_new_tokens=int(self._tokens.read()),
            samples=int(self._samples.read()),
            **self._truncation,
        )
        recipe = replace(recipe, interventions=self._interventions(recipe))
        return Recipe.from_json(recipe.to_json())  # the same checks as for a file

    def _interventions(self, recipe: Recipe) -> tuple[Intervention, ...]:
        """Return the interventions of the cards for this prompt; every card that is refused shows why.

        Raises:
            InputError: a card is refused.
        """
        interventions: list[Intervention] = []
        refused = ""
        for number, card in enumerate(self._cards):
            problem = ""
            try:
                one = card.intervention()
                recipe.check(one, self._server.model, self._server.sources)
                interventions.append(one)
            except InputError as error:
                problem = str(error)
                refused = refused or f"Intervention {number + 1}, {card.title}: {problem}"
            card.show_problem(problem)
        if refused:
            raise InputError(refused)
        return tuple(interventions)

    def run(self) -> None:
        """Put the recipe into the queue and show the answers as they grow."""
        self._guarded(self._start)

    def continue_answer(self) -> None:
        """Generate more from where the original answer ended."""

        def go() -> None:
            before, continued = str(self._begin.value), self._continued
            self._begin.value = self._continued = before + self._answer_text()
            try:
                self._start()
            except InputError:  # nothing was continued
                self._begin.value, self._continued = before, continued
                raise

        self._guarded(go)

    def edit_answer(self) -> None:
        """Put the original answer into the field of what the answer begins with, to be edited there."""

        def go() -> None:
            self._begin.value = str(self._begin.value) + self._answer_text()
            self._more.collapsed = False
            self._status.object = note(_EDIT_THERE)

        self._guarded(go)

    def next_turn(self) -> None:
        """Make the original answer a turn of the conversation, and ask for the next user message."""

        def go() -> None:
            experiment = self._experiment
            answered = None if experiment is None else final_answer(experiment, experiment.original)
            if experiment is None or answered is None:
                raise InputError("there is no complete final answer yet: press Run or Continue")
            recipe = experiment.recipe
            self._put_history((*recipe.history, (recipe.user, answered)))
            self._user.value = self._begin.value = self._expected.value = ""

        self._guarded(go)

    def _forget_continued(self) -> None:
        if self._continued and self._begin.value == self._continued:
            self._begin.value = ""
        self._continued = ""

    def _put_history(self, history: tuple[tuple[str, str], ...]) -> None:
        self._history = history
        self._turns.object, self._undo.visible = history_html(history), bool(history)

    def refresh(self) -> None:
        """Show what has changed since the last call."""
        if self._gallery is not None:
            self._gallery.refresh()
        job, experiment = self._job, self._experiment
        if job is None or experiment is None:
            return
        ended, position = job.ended.is_set(), self._server.queue.position(job)
        # a state is final when the job has ended; until then its answers may lack tokens
        state = job.state if ended or job.state is State.WAITING else State.RUNNING
        now = (job.steps, state, position, ended, id(job))
        if now == self._shown:
            return
        self._shown = now
        notes = "".join(note(text, "warning") for text in self._notes)
        status = notes + self._state_html(job, experiment, state)
        if not ended:  # before the answers, so that none of them grows beside the "Done" of the last run
            self._status.object = status
        answer = experiment.original if experiment.edited is None else experiment.edited
        self._show_map(answer, "original" if experiment.edited is None else "edited")
        comparison = experiment.comparison if ended else None
        changes = (comparison.original_change, comparison.edited_change) if comparison else ((), ())
        first = None if comparison is None else comparison.first_difference
        for pane, side, change in zip(self._answers, (experiment.original, experiment.edited), changes, strict=True):
            text = answer_html(experiment, side, self._theme, change=change, first_difference=first) if side else ""
            pane.object = (text + speed_html(side)) if side else _muted("No interventions.")
        if ended:
            self._comparison.object = difference_html(experiment) or _muted(_NO_COMPARISON)
            self._show_problems(experiment)
            self._status.object = status  # last, so that a page that shows "Done" has complete answers

    def _show_problems(self, experiment: Experiment) -> None:
        """Show on the cards of a run which interventions could not be applied or met no token."""
        if experiment.refused is not None:
            number, reason = experiment.refused
            self._run_cards[number].show_problem(reason)
        for number in experiment.unmatched:
            self._run_cards[number].show_problem(_UNMATCHED, "warning")

    def _start(self) -> None:
        recipe = self.recipe()
        if not recipe.user.strip():
            raise InputError("the user message is empty: write one and press Run")
        self._remember(recipe)
        self._job, self._experiment, self._notes = self.viewer.run(recipe)
        self._run_cards = list(self._cards)
        self._comparison.object = _muted(_COMPARISON_LATER if recipe.interventions else _NO_COMPARISON)
        self.refresh()

    def _state_html(self, job: Job, experiment: Experiment, state: State) -> str:
        position = self._server.queue.position(job)
        answer = experiment.edited or experiment.original
        texts = {
            State.WAITING: f"Waiting: {position} request{'s' if position != 1 else ''} before this one."
            if position
            else "Starting.",
            State.RUNNING: f"Generating the {'edited' if experiment.edited else 'original'} answer: "
            f"{count_of(len(answer.tokens), 'token')}.",
            State.DONE: "Done.",
            State.CANCELLED: "Stopped.",
            State.TIMED_OUT: f"Stopped at the time limit of {self._server.limits.max_seconds:g} s.",
        }
        if state is State.FAILED:
            refused = experiment.refused
            which = f"Intervention {refused[0] + 1}, {self._run_cards[refused[0]].title}: " if refused else ""
            return note(which + job.reason, "danger")
        if state is State.DONE and (cut := cut_off_sentence(experiment)):
            return note(f"Done. {cut} Press Continue, or raise New tokens.", "warning")
        return note(texts[state], "good" if state is State.DONE else "")

    def _show_map(self, answer: Answer, name: str) -> None:
        cfg = self._server.model.cfg
        if answer.experts:
            load = answer.load(cfg.n_layers, cfg.num_experts).tolist()
            self._map.param.update(load=shares_by_cell(load, cfg), active=answer.experts[-1].tolist())
        about = (
            f"Expert load over {count_of(len(answer.experts), 'token')} of the {name} answer. Framed: "
            f"experts of the last token."
        )
        self._map_title.object = f'<span class="wb-muted">{escape(about)}</span>'

    def _answer_text(self) -> str:
        if self._experiment is None or not self._experiment.original.tokens:
            raise InputError("there is no answer yet: press Run")
        tokens = list(self._experiment.original.tokens)
        if tokens[-1] in self._server.model.tokenizer.stop_ids:
            tokens.pop()  # what ended the answer would end it again
        text: str = self._server.model.tokenizer.decode(tokens)
        return text

    def _add_clicked(self, kind: str) -> None:
        """Add an intervention, or show below the buttons why it cannot be."""
        self._add_problem.object = ""
        try:
            self._add_intervention(kind)
        except InputError as error:
            self._add_problem.object = note(str(error), "danger")

    def _add_intervention(self, kind: str) -> None:
        cells = tuple((int(layer), int(expert)) for layer, expert in self._map.chosen)
        one = new_intervention(kind, cells, self._server.model.cfg.n_layers, str(self._effort.value))
        new = self._card(one)
        self._fold_others(new)
        self._put_cards([*self._cards, new])
        if kind in CELL_KINDS:
            self._map.chosen = []

    def _card(self, one: Intervention) -> InterventionCard:
        names = source_names(one.kind, self._server.sources)
        return InterventionCard(one, self._remove_card, names, opened=self._fold_others)

    def _fold_others(self, opened: InterventionCard) -> None:
        """Fold all cards but the one that was opened and those that show a problem."""
        for card in self._cards:
            if card is not opened and not card.has_problem:
                card.fold()

    def _remove_card(self, card: InterventionCard) -> None:
        self._put_cards([other for other in self._cards if other is not card])

    def _put_cards(self, cards: list[InterventionCard]) -> None:
        self._cards = cards
        self._list[:] = [card.view for card in cards]

    def _fill(self, recipe: Recipe) -> None:
        limits = self._server.limits
        self._user.value, self._developer.value = recipe.user, recipe.developer
        self._effort.value, self._begin.value = recipe.effort, recipe.begin
        self._temperature.put(recipe.temperature)
        self._seed.put(recipe.seed)
        self._tokens.put(min(recipe.max_new_tokens, limits.max_new_tokens))
        self._samples.put(min(recipe.samples, limits.max_samples))
        self._truncation: dict[str, Any] = {name: getattr(recipe, name) for name in ("top_k", "top_p", "min_p")}
        self._expected.value = recipe.expected
        self._more.collapsed = not (recipe.developer or recipe.begin or recipe.expected)
        self._put_history(recipe.history)
        self._put_cards([self._card(one) for one in recipe.interventions])
        for card in self._cards[:-1]:
            card.fold()

    def _finished(self) -> Experiment:
        """Return the experiment whose answers are shown, once they are not generated any more."""
        if self._experiment is None or self._job is None or not self._experiment.original.tokens:
            raise InputError("there is no answer yet: press Run")
        if not self._job.ended.is_set():
            raise InputError("the answers are not complete yet: wait until they are, or press Stop")
        return self._experiment

    def _load_recipe(self, recipe: Recipe) -> None:
        self._fill(recipe)
        self._remember(replace(recipe, model=self._server.name))

    def _load_saved(self, name: str, recipe: Recipe) -> None:
        self._load_recipe(recipe)
        own = recipe.model == self._server.name
        other = "" if own else f" It was made with the model {recipe.model}: experts and layers may differ."
        self._status.object = note(f"The recipe “{name}” was loaded. Press Run.{other}", "good" if own else "warning")

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do what a viewer asked for, or show below the prompt why it is refused."""
        try:
            action()
        except InputError as error:
            self._status.object = note(str(error), "danger")


def _muted(text: str) -> str:
    return f'<p class="wb-muted">{escape(text)}</p>'
