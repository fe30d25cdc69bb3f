"""The card of saved recipes on the live page: a list of what the server's folder holds; a click loads one."""

import time
from collections.abc import Callable
from typing import Any, ClassVar

import panel as pn
import param
from panel.custom import JSComponent

from workbench.counting import count_of
from workbench.dashboards.theme import CARD_CSS, PARTS_CSS, note
from workbench.errors import InputError
from workbench.live.recipe_folder import Listing, RecipeFolder
from workbench.research.recipe import Recipe

_INTERVENTIONS = 160  # characters of a line
_PROMPT = 80
_LOOK_S = 2.0  # how often the folder is examined for changes
_SHOWN_PROBLEMS = 10
_EMPTY = "No recipe is saved yet. Save one in the card Recipe, at the end of the page."


def entry_of(name: str, recipe: Recipe) -> dict[str, str]:
    """Return what the list shows of a recipe: name, model, interventions in one line, the beginning of the prompt."""
    interventions = "; ".join(one.describe() for one in recipe.interventions) or "no interventions"
    return {
        "name": name,
        "model": recipe.model,
        "prompt": _shortened(" ".join(recipe.user.split()) or "no user message", _PROMPT),
        "interventions": _shortened(interventions, _INTERVENTIONS),
    }


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


class RecipeList(JSComponent):
    """A list of buttons, one for each recipe, with a field that filters them.

    entries: see `entry_of`. clicked: the name of the recipe that was clicked last, and how many clicks there were.
    """

    entries = param.List(default=[])
    clicked = param.List(default=[])
    _esm = """
export function render({ model, el }) {
  const list = document.createElement("div"), filter = document.createElement("input");
  let clicks = 0;
  list.className = "list"; list.setAttribute("role", "group"); list.setAttribute("aria-label", "saved recipes");
  filter.placeholder = "filter"; filter.setAttribute("aria-label", "Filter the recipes");
  const line = (name, text) => {
    const part = document.createElement("span"); part.className = name; part.textContent = text; return part;
  };
  function select() {
    const wanted = filter.value.toLowerCase();
    [...list.children].forEach(button => {
      button.style.display = button.textContent.toLowerCase().includes(wanted) ? "" : "none";
    });
  }
  function draw() {
    filter.style.display = model.entries.length > 5 ? "" : "none";
    list.replaceChildren(...model.entries.map(entry => {
      const button = document.createElement("button"); button.type = "button";
      const first = line("first", ""); first.append(line("name", entry.name), line("model", entry.model));
      button.append(first, line("prompt", entry.prompt), line("interventions", entry.interventions));
      button.onclick = () => { model.clicked = [entry.name, ++clicks]; };
      return button;
    }));
    select();
  }
  filter.oninput = select;
  model.on("entries", draw);
  draw();
  const all = document.createElement("div"); all.append(filter, list);
  return all;
}
"""
    _stylesheets: ClassVar[list[Any]] = [
        """
.list{max-height:230px;overflow-y:auto;display:flex;flex-direction:column;gap:4px}
input{box-sizing:border-box;width:100%;margin-bottom:6px;padding:4px 10px;font:inherit;background:var(--wb-surface);
color:var(--wb-ink);border:1px solid var(--wb-control);border-radius:6px}
input::placeholder{color:var(--wb-muted);opacity:1}
button{all:unset;box-sizing:border-box;flex:none;width:100%;padding:5px 10px;border:1px solid var(--wb-line);
border-radius:6px;cursor:pointer;display:flex;flex-direction:column;gap:1px;line-height:1.4}
button:hover{background:var(--wb-raised)}
button:focus-visible,input:focus-visible{outline:3px solid var(--wb-accent);outline-offset:-2px}
span{overflow-wrap:anywhere}
.first{display:flex;justify-content:space-between;gap:12px}.name{font-weight:600;color:var(--wb-accent)}
.model,.interventions{color:var(--wb-muted);font-size:var(--wb-small)}
.prompt{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px}
"""
    ]


class RecipeGallery:
    """The card of the recipes of a folder. load: fills the page with a recipe, given with its name."""

    def __init__(self, folder: RecipeFolder, load: Callable[[str, Recipe], None]) -> None:
        self._folder, self._load = folder, load
        self._listing = Listing({}, [])
        self._changed: int | None = None  # time of the folder's last change that was read
        self._looked = 0.0
        self._list = RecipeList(sizing_mode="stretch_width", margin=(4, 10, 8, 10))
        self._status = pn.pane.HTML("", stylesheets=[PARTS_CSS], sizing_mode="stretch_width")
        self.view = pn.Card(
            self._status,
            self._list,
            sizing_mode="stretch_width",
            stylesheets=[CARD_CSS],
            margin=(6, 6),
        )
        self._list.param.watch(self._clicked, "clicked")
        self.read()

    def refresh(self) -> None:
        """Read the folder again if something was saved in it or removed."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        if self._folder.changed() != self._changed:
            self.read()

    def read(self) -> None:
        """Read the folder and show its recipes, and the files that cannot be used."""
        self._changed = self._folder.changed()
        try:
            self._listing = self._folder.listing()
        except InputError as error:
            self._listing = Listing({}, [])
            self._status.object = note(str(error), "danger")
        else:
            self._status.object = _status_html(self._listing)
        recipes = self._listing.recipes
        self._list.entries = [entry_of(name, recipe) for name, recipe in recipes.items()]
        self._list.visible = bool(recipes)
        self.view.title = f"Saved recipes ({len(recipes)})"

    def _clicked(self, event: Any) -> None:
        name = str(event.new[0]) if event.new else ""
        recipe = self._listing.recipes.get(name)
        if recipe is not None:  # a browser can send any name
            self._load(name, recipe)


def _status_html(listing: Listing) -> str:
    """Return a line for each file that cannot be used, and one if there are no recipes or more than are read."""
    lines = [note(f"Skipped {problem}", "warning") for problem in listing.problems[:_SHOWN_PROBLEMS]]
    if more := len(listing.problems) - _SHOWN_PROBLEMS:
        lines += [note(f"Skipped {count_of(more, 'more file')}.", "warning")] if more > 0 else []
    if listing.n_unread:
        lines.append(note(f"{count_of(listing.n_unread, 'file was', 'files were')} not read: too many.", "warning"))
    return "".join(lines) or ("" if listing.recipes else f'<p class="wb-muted">{_EMPTY}</p>')
