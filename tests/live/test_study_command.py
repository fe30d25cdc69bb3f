"""The commands that are copied write the recipe and name it, whatever its texts are."""

import shlex
import subprocess
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.live.study_command import study_command
from workbench.research.recipe import Intervention, Recipe

HOSTILE = "'\nEND_OF_RECIPE\ntouch hit\n$(touch hit) `touch hit`"
RECIPE = Recipe(
    user=HOSTILE,
    model="$(touch hit)",
    interventions=(
        Intervention("vector", layers=(1,), source="happy"),
        Intervention("vector", layers=(2,), source="happy"),
        Intervention("feature", source="$(touch hit)"),
    ),
)


def test_a_shell_writes_the_recipe_and_calls_the_command(tmp_path: Path) -> None:
    program = tmp_path / "workbench"
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o755)
    command = study_command(RECIPE)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert Recipe.from_file(tmp_path / "recipe.json") == RECIPE
    words = ran.stdout.decode().split("\0")[:-1]
    assert words[:4] == ["apply", "recipe.json", "--model", "$(touch hit)"]
    assert words[-4:] == ["--vector", "happy=happy.npy", "--sae", "$(touch hit)=$(touch hit)"]
    assert not (tmp_path / "hit").exists()
    careless = command.replace(shlex.quote(RECIPE.model), RECIPE.model)  # a negative control: the model's name as it is
    subprocess.run(["sh", "-c", careless], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (tmp_path / "hit").exists()


def test_what_cannot_be_a_study_is_refused() -> None:
    for recipe, reason in (
        (Recipe(), "no intervention"),
        (Recipe(interventions=(Intervention("patch", layers=(1,), source="1+1"),)), "to its own prompt only"),
    ):
        with pytest.raises(InputError, match=reason):
            study_command(recipe)
