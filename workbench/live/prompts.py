"""A recipe on many prompts: accuracy and length of the answers without its interventions and with them."""

from pathlib import Path

import pandas as pd

from workbench.model.transformer import GptOss
from workbench.research.answers import answers
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources


def accuracy_table(
    model: GptOss, recipe: Recipe, prompts: Path, sources: SteeringSources | None = None
) -> pd.DataFrame:
    """Return accuracy and new tokens with 95 % intervals, a row for the original answers and one for the edited.

    The recipe gives effort, sampling and interventions; its own prompt is not used. Directions come from the original
    answers.

    Raises:
        InputError: a prompt cannot be read, none has an expected answer, or the model lacks what is named.
    """
    recipe.check_other_prompts()
    options = {name: recipe.options[name] for name in ("samples", "temperature", "max_new_tokens", "seed")}
    original = answers(model, prompts, effort=recipe.effort, **options)
    edits = recipe.edits(model, original.transcripts, sources=sources)
    edited = answers(model, prompts, edits, effort=recipe.effort, **options)
    tables = [side.accuracy().assign(answers_of=name) for name, side in (("original", original), ("edited", edited))]
    return pd.concat(tables, ignore_index=True).rename(columns={"answers_of": "version"})
