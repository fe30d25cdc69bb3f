"""A recipe as commands for a terminal that run it as a study with controls."""

import shlex

from workbench.errors import InputError
from workbench.research.recipe import Recipe

_END = "END_OF_RECIPE"


def study_command(recipe: Recipe) -> str:
    """Return commands that write the recipe to a file and apply it to prompts, beside random interventions.

    Vectors and autoencoders have no path in a recipe: the commands name files and folders after them.

    Raises:
        InputError: the recipe has no interventions, or is of its own prompt alone.
    """
    if not recipe.interventions:
        raise InputError("there is no intervention to test: add one first")
    recipe.check_other_prompts()
    options = {"vector": "--vector {0}={0}.npy", "feature": "--sae {0}={0}"}
    given = dict.fromkeys(options[one.kind].format(one.source) for one in recipe.interventions if one.kind in options)
    command = shlex.join(
        [
            *("workbench", "apply", "recipe.json", "--model", recipe.model, "--prompts", "prompts.jsonl"),
            *("--controls", "20", "--out", "results"),
            *[word for text in given for word in text.split(" ", 1)],
        ]
    )
    return f"cat > recipe.json <<'{_END}'\n{recipe.to_json()}\n{_END}\n{command}\n"
