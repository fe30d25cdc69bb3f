"""A recipe on many prompts: the original answers beside the edited ones, which differ where the edit matters."""

import json
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.live.prompts import accuracy_table
from workbench.research.recipe import Intervention, Recipe

FORBID = Intervention("forbid", cells=tuple((layer, e) for layer in range(4) for e in range(12)))
RECIPE = Recipe(user="unused", effort="low", max_new_tokens=12, temperature=0.0)


def test_a_row_for_the_original_and_one_for_the_edited_answers(tmp_path: Path) -> None:
    nano, path = wb.load("nano", dtype=torch.float32), tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i}+1"}], "answer": str(i + 1)}
        for i in range(20, 25)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    same = accuracy_table(nano, RECIPE, path)
    assert same["version"].tolist() == ["original", "edited"]
    assert same["answers"].tolist() == [5, 5]
    original, edited = same.drop(columns="version").to_dict("records")
    assert original == pytest.approx(edited, nan_ok=True), "a recipe without interventions changes nothing"
    table = accuracy_table(nano, Recipe(**{**RECIPE.__dict__, "interventions": (FORBID,)}), path).set_index("version")
    assert table.loc["edited", "new_tokens"] != table.loc["original", "new_tokens"]
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        accuracy_table(nano, RECIPE, tmp_path / "missing.jsonl")
