"""The card of the recipe on the live page: save it or the answers, load one, copy it as Python or as a study."""

import json
from collections.abc import Callable
from html import escape

import panel as pn

from workbench.counting import count_of
from workbench.dashboards import widgets
from workbench.dashboards.theme import PARTS_CSS, note
from workbench.errors import InputError
from workbench.harmony.transcripts import row_of
from workbench.live.experiment import Experiment
from workbench.live.recipe_folder import RecipeFolder
from workbench.live.result import transcripts_of
from workbench.live.study_command import study_command
from workbench.research.recipe import Recipe
from workbench.research.recipe_python import recipe_python

_CODE_CSS = """
pre{margin:0;padding:10px 12px;background:var(--wb-raised);color:var(--wb-ink);border-radius:var(--wb-radius);
overflow-x:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}
"""
_REPLACE = "Replace a recipe of this name"
_SAVE = """
const type = name.endsWith(".json") ? "application/json" : "application/jsonl";
if (!cb_obj.value) return;
const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([cb_obj.value], {type}));
link.download = name;
link.click();
setTimeout(() => URL.revokeObjectURL(link.href), 10000);
"""
_COPY = "navigator.clipboard?.writeText(code.value).catch(() => {})"  # a browser may not allow it
_ABOUT = (
    "<p>The recipe is the prompt, the sampling options and the interventions. The address of this page contains it, "
    "and <code>workbench apply recipe.json</code> runs a saved one. <i>Copy as a study</i> gives the commands that "
    "test it on your prompts beside random interventions of the same kind and size. <i>Save the answers</i> writes "
    "both answers as transcripts: <code>workbench capture MODEL answers.jsonl live.zarr</code> records them, and "
    "<code>workbench dashboard live.zarr --model MODEL</code> shows them on all other pages, with the task "
    "<i>original</i> or <i>edited</i>.</p>"
)


class RecipeCard:
    """Buttons for the recipe of a page. recipe: returns it, or refuses. load: fills the page with another one.

    answers: returns the experiment whose answers are complete, or refuses. folder: where viewers may save recipes for
    each other.
    """

    def __init__(
        self,
        recipe: Callable[[], Recipe],
        load: Callable[[Recipe], None],
        answers: Callable[[], Experiment],
        folder: RecipeFolder | None = None,
    ) -> None:
        self._recipe, self._load_recipe, self._answers, self._folder = recipe, load, answers, folder
        wide = {"sizing_mode": "stretch_width"}
        # what the browser copies, and what it saves
        self._copied, self._saved, self._saved_rows = (pn.widgets.TextAreaInput(visible=False) for _ in range(3))
        for field, name in ((self._saved, "recipe.json"), (self._saved_rows, "answers.jsonl")):
            field.jscallback(value=_SAVE, args={"name": name})
        self._code = pn.pane.HTML("", stylesheets=[_CODE_CSS], **wide)
        self._status = pn.pane.HTML("", stylesheets=[PARTS_CSS], **wide)
        self._save, self._save_answers, self._copy, self._study = (
            pn.widgets.Button(label=label, width=150)
            for label in ("Save the recipe", "Save the answers", "Copy as Python", "Copy as a study")
        )
        self._load = pn.widgets.FileInput(label="Load a recipe", accept=".json", multiple=False)
        self._name = pn.widgets.TextInput(label="Name of the recipe", max_length=200, width=260)
        # a group, as Panel's single checkbox has no name for screen readers
        self._replace = pn.widgets.CheckBoxGroup(options=[_REPLACE], margin=(0, 10, 10, 10))
        self._share = pn.widgets.Button(label="Save for all viewers", width=170)
        self._share.on_click(lambda _: self._guarded(self.share))
        self._save.on_click(lambda _: self._guarded(self.save))
        self._save_answers.on_click(lambda _: self._guarded(self.save_answers))
        self._copy.on_click(lambda _: self._guarded(lambda: self.show_code(recipe_python)))
        self._study.on_click(lambda _: self._guarded(lambda: self.show_code(study_command)))
        for button in (self._copy, self._study):
            button.js_on_click(args={"code": self._copied}, code=f"setTimeout(() => {_COPY}, 400)")
        self._load.param.watch(lambda event: self._guarded(self.load), "value")

    def view(self) -> pn.Column:
        """Return the buttons with what they did below them."""
        buttons = pn.FlexBox(
            self._save, self._save_answers, self._copy, self._study, self._load, align_items="flex-end"
        )
        return pn.Column(
            widgets.html(_ABOUT),
            buttons,
            pn.FlexBox(
                self._name, self._share, self._replace, align_items="flex-end", visible=self._folder is not None
            ),
            self._status,
            self._copied,
            self._saved,
            self._saved_rows,
            self._code,
            sizing_mode="stretch_width",
        )

    def save(self) -> None:
        """Let the browser save the recipe as a file.

        Raises:
            InputError: the page describes no recipe.
        """
        text = self._recipe().to_json() + "\n"
        self._saved.value = ""  # the same recipe can be saved twice
        self._saved.value = text
        self._status.object = note("The recipe was saved as recipe.json.", "good")

    def share(self) -> None:
        """Save the recipe in the folder of the server, where all viewers see it.

        Raises:
            InputError: the page describes no recipe, or the name is not allowed or taken.
        """
        if self._folder is None:
            raise InputError("the server has no folder for recipes: start it with --recipes FOLDER")
        name = self._folder.save(str(self._name.value), self._recipe(), replace=bool(self._replace.value))
        self._replace.value = []  # so that the next one replaces nothing unasked
        self._status.object = note(f"The recipe was saved for all viewers as {name}.", "good")

    def save_answers(self) -> None:
        """Let the browser save both answers as transcripts, which a capture reads.

        Raises:
            InputError: there are no complete answers.
        """
        rows = [json.dumps(row_of(row), ensure_ascii=False) for row in transcripts_of(self._answers())]
        self._saved_rows.value = ""
        self._saved_rows.value = "\n".join(rows) + "\n"
        saved = f"{count_of(len(rows), 'answer was', 'answers were')} saved as answers.jsonl."
        self._status.object = note(saved, "good")

    def load(self) -> None:
        """Fill the page with the recipe of the chosen file.

        Raises:
            InputError: the file is no recipe.
        """
        if self._load.value:
            self._load_recipe(Recipe.from_json(bytes(self._load.value).decode("utf-8", "replace")))
            self._status.object = note("The recipe was loaded. Press Run.", "good")

    def show_code(self, code: Callable[[Recipe], str]) -> None:
        """Show what the browser copies: a program, or commands.

        Raises:
            InputError: the page describes no recipe, or one without interventions where they are needed.
        """
        self._copied.value = code(self._recipe())
        self._code.object = f"<pre>{escape(self._copied.value)}</pre>"
        copied = "Copied to the clipboard, if the browser allows it. The text is below."
        self._status.object = note(copied, "good")

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do what a viewer asked for, or show below the buttons why it is refused."""
        try:
            action()
        except InputError as error:
            self._status.object = note(str(error), "danger")
            self._copied.value = self._code.object = ""  # what was copied before is not what was asked for now
