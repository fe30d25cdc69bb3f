"""A folder of saved recipes that the viewers of a live page share: `workbench live MODEL --recipes FOLDER`.

Only files `NAME.json` that lie in the folder itself are read, and only names of letters, digits, spaces and `._-` are
written. Links and folders in it are not followed.
"""

import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import InputError
from workbench.outputs import staged
from workbench.research.recipe import Recipe

MAX_RECIPES = 500  # files that are read or may be saved
_SUFFIX = ".json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")
_COMMAND = "live"


@dataclass(frozen=True)
class Listing:
    """What a folder holds. recipes: by name, sorted. problems: a line for each file that is no recipe.

    n_unread: number of files beyond the limit, which were not read.
    """

    recipes: dict[str, Recipe]
    problems: list[str]
    n_unread: int = 0


class RecipeFolder:
    """Saved recipes of a folder.

    Raises:
        InputError: the path is not a folder, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        # by file name: time and size, and what was read then, so that a file is read once for all viewers
        self._read: dict[str, tuple[tuple[int, int], Recipe | str]] = {}
        self._names()

    def _names(self) -> list[str]:
        """Return the names of files that may be recipes."""
        try:
            names = [name for name in os.listdir(self.path) if name.endswith(_SUFFIX) and not name.startswith(".")]
        except NotADirectoryError as error:
            raise InputError(f"{self.path} is not a folder: give a folder for saved recipes") from error
        except FileNotFoundError as error:
            raise InputError(f"{self.path} does not exist: make the folder for saved recipes first") from error
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be read: {error.strerror}; give a folder for saved recipes"
            ) from error
        return sorted(names, key=lambda name: (name.lower(), name))

    def changed(self) -> int | None:
        """Return when a file was last added, replaced or removed (ns), None if the folder cannot be read."""
        try:
            return os.stat(self.path).st_mtime_ns
        except OSError:
            return None

    def listing(self) -> Listing:
        """Return the recipes of the folder, and a line for each file that cannot be used.

        Raises:
            InputError: the folder cannot be read.
        """
        names = self._names()
        recipes: dict[str, Recipe] = {}
        problems: list[str] = []
        with self._lock:
            self._read = {name: self._of_file(name) for name in names[:MAX_RECIPES]}
            for name, (_, content) in self._read.items():
                if isinstance(content, Recipe):
                    recipes[name.removesuffix(_SUFFIX)] = content
                else:
                    problems.append(f"{_printable(name)}: {content}")
        return Listing(recipes, problems, max(len(names) - MAX_RECIPES, 0))

    def _of_file(self, name: str) -> tuple[tuple[int, int], Recipe | str]:
        """Return the time and size of a file, and its recipe or why there is none."""
        try:
            status = os.lstat(self.path / name)
        except OSError as error:
            return (0, 0), f"cannot be read: {error.strerror}"
        state = status.st_mtime_ns, status.st_size
        if not stat.S_ISREG(status.st_mode):
            return state, "is not a file of this folder (links are not followed)"
        known = self._read.get(name)
        if known is not None and known[0] == state:
            return known
        try:
            return state, Recipe.from_file(self.path / name)
        except InputError as error:
            return state, str(error).removeprefix(f"{self.path / name}: ")

    def save(self, name: str, recipe: Recipe, *, replace: bool = False) -> str:
        """Write a recipe under a name and return the name of its file; `replace` also replaces a recipe of this name.

        Raises:
            InputError: the name is not allowed or taken, the folder is full, or it cannot be written.
        """
        file_name = checked_name(name) + _SUFFIX
        path = self.path / file_name
        exists = os.path.lexists(path)
        if exists and not replace:
            raise InputError(f"{file_name} exists: choose another name, or tick “Replace a recipe of this name”")
        if not exists and len(self._names()) >= MAX_RECIPES:
            raise InputError(f"the folder holds {MAX_RECIPES} recipes already: remove some, or replace one")
        try:
            with staged(path, command=_COMMAND, overwrite=replace, owned=_is_recipe) as part:
                part.write_text(recipe.to_json() + "\n", encoding="utf-8")
        except InputError as error:  # viewers need not know where the folder is
            raise InputError(str(error).replace(f"{self.path}{os.sep}", "")) from error
        return file_name


def checked_name(name: str) -> str:
    """Return the name of a recipe without spaces around it and without ".json".

    Raises:
        InputError: it is empty or too long, or has other characters than letters, digits, spaces and "._-".
    """
    plain = name.strip().removesuffix(_SUFFIX).rstrip(" .")
    if not _NAME.fullmatch(plain):
        shown = "is empty" if not plain else f"{name[:40]!r} cannot be used"
        raise InputError(
            f"the name {shown}: expected 1 to 80 letters (A to Z), digits, spaces, dots, hyphens or underscores, a "
            "letter or digit first"
        )
    return plain


def _is_recipe(path: Path) -> bool:
    """Return whether an existing file is a recipe, which alone may be replaced."""
    try:
        Recipe.from_file(path)
    except InputError:
        return False
    return True


def _printable(name: str) -> str:
    """Return a file name in which characters that cannot be shown are escaped."""
    return name.encode("utf-8", "backslashreplace").decode() if name.isprintable() else ascii(name)
