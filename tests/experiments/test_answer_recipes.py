"""Recipes of doses: names, what each edits, and random recipes of the same kind and size."""

import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import answer_recipes
from workbench.experiments.answer_recipes import direction_recipes, expert_recipes, read_doses
from workbench.experiments.from_run import transcripts
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort == "medium" and row.meta["task"] in ("recall", "reverse")][::5]


def test_doses_are_different_finite_numbers() -> None:
    assert read_doses("0,0.5,2") == [0, 0.5, 2]
    assert read_doses(2) == [2]
    for wrong in ("", "a", "1,,2", "1,1", "nan", "inf"):
        with pytest.raises(InputError, match="doses="):
            read_doses(wrong)


def test_a_dose_of_zero_masks_experts_and_another_scales_their_gates(
    nano: GptOss, rows: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [((1, n % 16), (2, n // 16)) for n in range(20)]
    with pytest.raises(InputError, match="fewer than 20 random sets"):
        expert_recipes(nano, rows, "facts", [0.0], 1, 0)
    monkeypatch.setattr(answer_recipes, "matched_sets", lambda load, own, n, seed: sets[:n])
    monkeypatch.setattr(answer_recipes, "named_experts", lambda model, rows, group: ((1, 3), (2, 5)))
    recipes, random, about = expert_recipes(nano, rows, "facts", [0.0, 2.0], 20, 0)
    assert list(recipes) == ["masked before top-k", "gates × 2"]
    assert about["group"] == "facts"
    assert list(random) == list(recipes)
    for name, edits in recipes.items():
        assert len(random[name]) == 20
        assert all(len(others) == len(edits) for others in random[name]), "as many layers"
    row = [rows[0].tokens]
    logits = {"none": nano(row)} | {name: changed(nano, edits, row) for name, edits in recipes.items()}
    assert not torch.equal(logits["none"], logits["masked before top-k"])
    assert not torch.equal(logits["masked before top-k"], logits["gates × 2"])
    same = expert_recipes(nano, rows, "facts", [1.0], 20, 0)[0]["gates × 1"]
    torch.testing.assert_close(changed(nano, same, row), logits["none"])
    for group, doses, message in (("none", [1.0], "group='none'"), ("facts", [-1.0], "0 or more")):
        with pytest.raises(InputError, match=message):
            expert_recipes(nano, rows, group, doses, 20, 0)
    with pytest.raises(InputError, match="of one group"):
        expert_recipes(nano, [row for row in rows if row.meta["task"] == "reverse"], "", [1.0], 20, 0)


def test_random_directions_are_as_long_as_the_channel_direction(nano: GptOss, rows: list[Transcript]) -> None:
    recipes, random, about = direction_recipes(nano, rows, [-1.0, 1.0], 20, 0)
    assert list(recipes) == ["-1 × (final − analysis)", "+1 × (final − analysis)"]
    assert "blocks.2.hook_resid_post" in about["what"]
    assert [len(sets) for sets in random.values()] == [20, 20]


def changed(model: GptOss, edits: list[Edit], row: list[list[int]]) -> torch.Tensor:
    with applied(model, *edits):
        return model(row)
