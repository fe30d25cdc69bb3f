"""A recipe on many prompts: random interventions are of its kind and size, and the result is saved as others are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.hooks.interventions import applied
from workbench.model.transformer import GptOss
from workbench.research import recipe_study as module
from workbench.research.answers import answers
from workbench.research.recipe import Intervention, Recipe
from workbench.research.recipe_study import recipe_study
from workbench.research.steering_sources import SteeringSources

FORBID = Intervention("forbid", cells=((1, 2), (2, 3)))
PROMPTS = ["12+7", "3*4", "1+1", "20-4", "5*5", "9+9"]


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def drawer(nano: GptOss) -> module._RandomInterventions:
    rows = answers(nano, PROMPTS, effort="low", max_new_tokens=6).transcripts
    vectors = {"happy": torch.randn(nano.cfg.d_model, generator=torch.Generator().manual_seed(1))}
    return module._RandomInterventions(nano, Recipe(user="1+1"), rows, SteeringSources(vectors))


def test_random_interventions_are_of_the_same_kind_and_size(nano: GptOss, drawer: module._RandomInterventions) -> None:
    sets = drawer._expert_sets(FORBID, 20, 0)
    assert len(set(sets)) == 20
    assert {tuple(sorted(layer for layer, _ in cells)) for cells in sets} == {(1, 2)}
    assert all(not set(cells) & set(FORBID.cells) for cells in sets)
    heads = drawer._head_sets(replace(FORBID, kind="scale_sinks", cells=(), layers=(1,), heads=(0,)), 3, 0)
    assert len(set(heads)) == 3
    assert all(len(own) == 1 and own != (0,) for own in heads)
    point, ids = "blocks.1.hook_resid_post", torch.tensor([Recipe(user="12+7").prompt_ids(nano)])
    norms = []
    for edits in drawer._directions(Intervention("vector", layers=(1,), source="happy", strength=2.0), 20, 0)[:3]:
        with torch.no_grad():
            _, plain = nano.run_with_cache(ids, names_filter=point)
            with applied(nano, *edits):
                _, after = nano.run_with_cache(ids, names_filter=point)
        norms.append(float((after[point] - plain[point])[0, 3].norm()))
    want = 2 * float(drawer._sources.vectors["happy"].norm())
    np.testing.assert_allclose(norms, want, rtol=1e-3)
    assert abs(norms[0] - want / 2) > 0.1, "a negative control: another norm"


def test_what_has_no_random_kind_is_refused(nano: GptOss) -> None:
    def study(*interventions: Intervention, controls: int = 20) -> None:
        recipe = Recipe(effort="low", max_new_tokens=2, interventions=interventions)
        recipe_study(nano, recipe, PROMPTS, controls=controls)

    for one, reason in (
        (Intervention("scale_sinks", layers=(1,), strength=0.0), "study sink-ablation"),
        (Intervention("scale_heads", layers=(1,), strength=0.0), "choose heads, or --controls 0"),
        (Intervention("scale_sinks", layers=(1,), heads=(0, 1, 2, 3)), "choose fewer heads"),
        (Intervention("patch", layers=(1,), source="1+1"), "to its own prompt only"),
    ):
        with pytest.raises(InputError, match=reason):
            study(one)
    with pytest.raises(InputError, match="no interventions"):
        study()
    with pytest.raises(InputError, match="20"):
        study(FORBID, controls=3)


@pytest.mark.filterwarnings("ignore::workbench.studies.intervals.FewPromptsWarning")
def test_a_recipe_is_tested_on_the_command_line(tmp_path: Path) -> None:
    recipe = {
        "recipe": 1,
        "effort": "low",
        "max_new_tokens": 4,
        "interventions": [{"kind": "forbid", "cells": [[1, 2], [2, 3]]}],
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    rows = (DATA / "prompts.jsonl").read_text().splitlines()[:6]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    common = ("apply", str(tmp_path / "r.json"), "--prompts", str(tmp_path / "p.jsonl"))
    ran = run_command(*common, "--controls", "20", "--out", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert "6 sequences of 6 prompts, 20 random controls" in ran.out
    assert "forbid L1 E2, L2 E3" in ran.out
    saved = json.loads((tmp_path / "out" / "generated-answers_recipe.json").read_text())
    assert saved["dims"]["control"] == 20
    assert Recipe.from_json(saved["attrs"]["recipe"]).interventions == (Intervention("forbid", cells=((1, 2), (2, 3))),)
    assert run_command("apply", str(tmp_path / "r.json"), "--controls", "20").code == 2
    assert run_command(*common, "--out", str(tmp_path / "other")).code == 2
