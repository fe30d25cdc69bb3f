"""A folder of saved recipes: what is read and written, and names that could lead out of it."""

import os
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.live import recipe_folder
from workbench.live.recipe_folder import RecipeFolder, checked_name
from workbench.research.recipe import Recipe

RECIPE = Recipe(user="12+7")


def test_only_recipes_of_the_folder_itself_are_read_and_the_others_are_named(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(RECIPE.to_json())
    path = tmp_path / "recipes"
    (path / "below").mkdir(parents=True)
    (path / "below" / "deep.json").write_text(RECIPE.to_json())
    (path / "folder.json").mkdir()
    (path / "good.json").write_text(RECIPE.to_json())
    (path / "broken.json").write_text("{")
    (path / "other.json").write_text('{"recipe": 1, "users": "<b>"}')
    (path / "large.json").write_text(" " * 300_000)
    (path / "notes.txt").write_text("text")
    (path / ".hidden.json").write_text(RECIPE.to_json())
    (path / "link.json").symlink_to(outside)
    os.mkfifo(path / "pipe.json")  # opening it would wait forever
    listing = RecipeFolder(path).listing()
    assert listing.recipes == {"good": RECIPE}
    names = [line.split(":")[0] for line in listing.problems]
    assert names == ["broken.json", "folder.json", "large.json", "link.json", "other.json", "pipe.json"]
    assert all("\n" not in line and str(path) not in line for line in listing.problems)
    assert "'users' is unknown" in listing.problems[4]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RecipeFolder(tmp_path)
    folder.save("one", RECIPE)
    assert folder.listing().recipes == {"one": RECIPE}
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "from_file", lambda _: pytest.fail("it was read again"))
        assert folder.listing().recipes == {"one": RECIPE}
    other = Recipe(user="3*4", seed=7)
    folder.save("one", other, replace=True)
    assert folder.listing().recipes == {"one": other}, "negative control: the change is seen"


def test_a_recipe_is_replaced_only_if_asked_and_other_files_never(tmp_path: Path) -> None:
    folder = RecipeFolder(tmp_path)
    assert folder.save(" my test.json ", RECIPE) == "my test.json"
    other = Recipe(user="3*4")
    with pytest.raises(InputError, match=r"my test\.json exists: choose another name"):
        folder.save("my test", other)
    assert folder.listing().recipes == {"my test": RECIPE}
    folder.save("my test", other, replace=True)
    assert folder.listing().recipes == {"my test": other}
    (tmp_path / "data.json").write_text("[1, 2]")
    target = tmp_path / "target.txt"
    target.write_text("text")
    (tmp_path / "link.json").symlink_to(target)
    for name in ("data", "link"):
        with pytest.raises(InputError) as refused:
            folder.save(name, other, replace=True)
        assert str(tmp_path) not in str(refused.value)
    assert ((tmp_path / "data.json").read_text(), target.read_text()) == ("[1, 2]", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json", "link.json", "my test.json", "target.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", ".json", ".hidden", "../up", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\nb", "a:b", "~"),
        *("-rf", "<b>", "é", "a" * 81, "%2e%2e%2fup", "a|b", "x\u202ey"),
    ],
)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipes"
    path.mkdir()
    with pytest.raises(InputError, match="expected 1 to 80 letters"):
        RecipeFolder(path).save(name, RECIPE, replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["recipes"]
    assert list(path.iterdir()) == []
    assert checked_name("Sinks_off v1.2") == "Sinks_off v1.2", "negative control"


def test_the_number_of_recipes_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_folder, "MAX_RECIPES", 2)
    folder = RecipeFolder(tmp_path)
    folder.save("a", RECIPE)
    folder.save("b", RECIPE)
    with pytest.raises(InputError, match="holds 2 recipes already"):
        folder.save("c", RECIPE)
    folder.save("b", RECIPE, replace=True)
    (tmp_path / "c.json").write_text(RECIPE.to_json())
    assert (list(folder.listing().recipes), folder.listing().n_unread) == (["a", "b"], 1)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match="saved recipes"):
            RecipeFolder(path)
