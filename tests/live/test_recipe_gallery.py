"""The card of saved recipes without a browser: what it lists, what a click loads, and what a viewer saves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.live import recipe_gallery
from workbench.live.model_server import ModelServer
from workbench.live.page import LivePage
from workbench.live.recipe_folder import RecipeFolder
from workbench.live.recipe_gallery import RecipeGallery, entry_of
from workbench.research.recipe import Intervention, Recipe

FORBID = Recipe(user="12+7", effort="low", interventions=(Intervention("forbid", cells=((1, 5),)),))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ModelServer]:
    made = ModelServer(wb.load("nano", dtype=torch.float32), "nano", recipes=RecipeFolder(tmp_path))
    yield made
    made.close()


def test_an_entry_states_model_interventions_and_the_beginning_of_the_prompt() -> None:
    assert entry_of("sinks", FORBID) == {
        "name": "sinks",
        "model": "nano",
        "prompt": "12+7",
        "interventions": "forbid L1 E5; acts on all tokens",
    }
    long = entry_of("long", Recipe(user="a  b\n" * 100))
    assert len(long["prompt"]) == 80
    assert long["prompt"].startswith("a b a b")
    assert long["interventions"] == "no interventions"


def test_a_recipe_that_one_viewer_saves_is_loaded_by_another(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_gallery, "_LOOK_S", 0.0)
    first, second = (LivePage(server, recipe, "light", lambda _: None) for recipe in (FORBID, Recipe(user="1+1")))
    assert second._gallery is not None
    assert "No recipe is saved yet" in second._gallery._status.object
    card = first._recipe_card
    card._name.value = "../first"
    card._share.clicks += 1
    assert "cannot be used" in card._status.object
    card._name.value = "first"
    card._share.clicks += 1
    assert "saved for all viewers as first.json" in card._status.object
    card._share.clicks += 1
    assert "first.json exists" in card._status.object, "it is not replaced unasked"
    card._replace.value = card._replace.options
    card._share.clicks += 1
    assert "saved for all viewers as first.json" in card._status.object
    second.refresh()
    listed = second._gallery._list
    assert [entry["name"] for entry in listed.entries] == ["first"]
    listed.clicked = ["absent", 1]
    assert second.recipe().user == "1+1"
    listed.clicked = ["first", 2]
    assert second.recipe() == FORBID
    assert "“first” was loaded" in second._status.object
    (tmp_path / "first.json").unlink()
    second.refresh()
    assert listed.entries == []


def test_files_that_are_no_recipes_are_named_on_the_card(tmp_path: Path) -> None:
    (tmp_path / "<img src=x>.json").write_text("{")
    (tmp_path / "other.json").write_text(Recipe(user="<b>", model="20b").to_json())
    loaded: list[str] = []
    gallery = RecipeGallery(RecipeFolder(tmp_path), lambda name, _: loaded.append(name))
    assert "Skipped &lt;img src=x&gt;.json:" in gallery._status.object
    assert "<img" not in gallery._status.object
    assert gallery.view.title == "Saved recipes (1)"
    gallery._list.clicked = ["other", 1]
    assert loaded == ["other"]


def test_a_recipe_of_another_model_is_named_as_such(server: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(Recipe(user="1+1", model="20b").to_json())
    shown = LivePage(server, FORBID, "light", lambda _: None)
    assert shown._gallery is not None
    shown._gallery._list.clicked = ["other", 1]
    assert "made with the model 20b" in shown._status.object
    (tmp_path / "own.json").write_text(Recipe(user="1+1").to_json())
    shown._gallery.read()
    shown._gallery._list.clicked = ["own", 2]
    assert "made with" not in shown._status.object, "negative control"
