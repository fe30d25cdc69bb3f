"""The bundled nano does what its card states: the analysis helps where several steps are needed, and only there."""

import json
from typing import Any

import pytest

from workbench.data.card import card
from workbench.data.tasks import FAMILIES, STEPLESS, STEPWISE
from workbench.data.train import NANO
from workbench.harmony.rendering import EFFORTS
from workbench.model.checkpoint import BUNDLED, open_checkpoint

FOLDER = BUNDLED["nano"]


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return json.loads((FOLDER / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def cells(evaluation: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(c["task"], c["effort"]): c for c in evaluation["accuracy"]["packed, float32"]}


def test_the_checkpoint_is_the_one_that_was_evaluated(evaluation: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(FOLDER)
    assert evaluation["checkpoint"] == checkpoint.digest
    assert checkpoint.cfg == NANO
    assert checkpoint.experts == "mxfp4"


def test_the_card_is_up_to_date(evaluation: dict[str, Any]) -> None:
    config, training = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("config", "training"))
    assert (FOLDER / "README.md").read_text() == card(config, training, evaluation)


@pytest.mark.parametrize("task", STEPWISE)
def test_steps_help_where_they_are_needed(task: str, cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert cells[task, "high"]["accuracy"] >= 0.9
    assert cells[task, "low"]["high"] < cells[task, "high"]["low"]


@pytest.mark.parametrize("task", STEPLESS)
def test_accuracy_does_not_depend_on_effort_elsewhere(task: str, cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert all(cells[task, effort]["accuracy"] >= 0.9 for effort in EFFORTS)


def test_more_effort_gives_a_longer_analysis(cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    for task in FAMILIES:
        lengths = [cells[task, effort]["new_tokens"] for effort in EFFORTS]
        if task != "tool":  # its analysis is part of the prompt
            assert lengths == sorted(lengths), task
            assert lengths[0] < lengths[2], task


def test_packing_costs_less_than_two_points(evaluation: dict[str, Any]) -> None:
    assert all(change["difference"] > -0.02 for change in evaluation["comparisons"])
