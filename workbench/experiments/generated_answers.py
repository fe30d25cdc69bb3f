"""Generated answers under interventions: accuracy, length, refusals and routing of new answers, at several doses.

The model answers the prompts of the sequences at temperature 0, without an edit and with each. A chosen edit is ranked
among the same edits of at least 20 random sets of experts of equal load, or of random directions of equal norm, in the
same dose. `workbench.experiments.answer_effects.behaviour` takes any edits and any controls.

Reference: SteerMoE, arXiv 2509.09660; arXiv 2606.10703, for which selection statistics do not predict such effects.
"""

import json
from collections.abc import Sequence
from typing import Literal

import xarray as xr

from workbench.errors import InputError
from workbench.experiments.answer_effects import behaviour
from workbench.experiments.answer_recipes import direction_recipes, expert_recipes, read_doses
from workbench.experiments.expert_sets import group_of
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="generated-answers",
    title="Generated answers under interventions",
    question="What do interventions change of accuracy, length and refusals of newly generated answers, beyond what "
    "random ones of the same size do?",
    compute="new answers to the prompts of the sequences: for each of about three doses, one and 20 of random controls",
    cost={"passes": 128, "sequence_new_tokens": 16384},
    options={
        "change": "experts: gate weights of a group's experts times the dose, 0 masking them before the top-k "
        "selection (default); direction: the channel direction times the dose.",
        "group": "Domain or task whose experts are changed (default: that of most sequences).",
        "doses": "Doses, separated by commas (default: 0,0.5,2 for experts; -1,1 for direction).",
        "controls": "Random sets or directions for each dose, at least 20 (default: 20).",
        "max_new_tokens": "Most tokens of an answer (default: 256).",
    },
    figures="workbench.figures.generated_answers",
    order=105,
)


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    change: Literal["experts", "direction"] = "experts",
    group: str = "",
    doses: str = "",
    controls: int = MIN_CONTROLS,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the dose curve of a change of experts or along the channel direction, on newly generated answers.

    Raises:
        InputError: the change, the group or a dose is unknown, or there are too few controls or prompts.
    """
    check_controls(controls)
    if change not in ("experts", "direction"):
        raise InputError(f"change={change!r}: use experts or direction")
    wanted = read_doses(doses or ("0,0.5,2" if change == "experts" else "-1,1"))
    if change == "experts":
        recipes, null, about = expert_recipes(model, rows, group, wanted, controls, seed)
    else:
        recipes, null, about = direction_recipes(model, rows, wanted, controls, seed)
    rows = [row for row in rows if not group or group_of(row) == group] if change == "experts" else rows
    result = behaviour(model, rows, recipes, controls=null, max_new_tokens=max_new_tokens, seed=seed)
    result = result.assign_coords(dose=("intervention", list(wanted)))
    title = f"Generated answers under {about['what']}"
    return {"answers": result.assign_attrs(title=title, null=json.dumps(about))}
