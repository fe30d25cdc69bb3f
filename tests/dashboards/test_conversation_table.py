"""The table of conversations: every field of the metadata is a column, or is stated once if it is the same in all."""

import json
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.dashboards.conversation_table import MAX_FIELDS, metadata_table


def run_with(metas: list[dict[str, Any]], **columns: list[Any]) -> Any:
    """Return what the table reads of a run, with this metadata."""
    n = len(metas)
    own: dict[str, list[Any]] = {
        "id": [f"p{i}/low/0" for i in range(n)],
        "prompt_id": [f"p{i}" for i in range(n)],
        "task": ["sum"] * n,
        "domain": [""] * n,
        "effort": ["low"] * n,
        "length": list(range(20, 20 + n)),
        "n_prompt": [10] * n,
        "expected": [str(i) for i in range(n)],
        "correct": [1, 0, -1, 1][:n],
        "meta": [json.dumps(meta) for meta in metas],
    }
    return SimpleNamespace(sequences=pd.DataFrame(own | columns))


def test_every_field_of_the_metadata_is_a_column_of_its_type() -> None:
    metas = [
        {"finish_reason": "stop", "source": "inspect", "scores": {"match": 1, "note": "ok"}, "task": "sum"},
        {"finish_reason": "length", "source": "inspect", "scores": {"match": 0.5}, "seconds": 2, "flagged": True},
        {"finish_reason": "stop", "source": "inspect", "scores": {}, "tags": ["a", "b"], "grade": "A"},
    ]
    rows, constant, left_out = metadata_table(run_with(metas, flags=["truncated", "", ""]), [2, 0, 1])
    assert rows["conversation"].tolist() == ["p2/low/0", "p0/low/0", "p1/low/0"]
    assert rows["grade"].tolist() == ["", "correct", "wrong"]
    assert rows["grade (metadata)"].tolist() == ["A", "", ""]
    assert rows["irregularities"].tolist() == ["", "truncated", ""]
    assert rows["answer tokens"].tolist() == [12, 10, 11]
    assert rows["finish_reason"].tolist() == ["stop", "stop", "length"]
    assert rows["scores.match"].tolist()[1:] == [1.0, 0.5]
    assert rows["scores.match"].dtype.kind == "f"
    assert rows["seconds"].isna().tolist() == [True, True, False]
    assert rows["flagged"].tolist() == ["", "", "yes"]
    assert rows["tags"].tolist() == ['["a", "b"]', "", ""]
    assert constant == {"task": "sum", "effort": "low", "prompt tokens": "10", "source": "inspect"}
    assert "domain" not in rows, "no conversation has one"
    assert left_out == 0
    one, no_constant, _ = metadata_table(run_with(metas), [0])
    assert (len(one), no_constant) == (1, {}), "negative control: one row has all its fields as columns"
    assert one["source"].tolist() == ["inspect"]


def test_a_file_with_a_field_in_each_row_has_a_readable_table() -> None:
    metas = [{f"field {i}": i, "seen in all": i} for i in range(100)]
    run = run_with(metas, correct=[1] * 100)
    rows, _, left_out = metadata_table(run, range(100))
    assert "seen in all" in rows
    assert left_out == 101 - MAX_FIELDS
    long = metadata_table(run_with([{"text": "x" * 5000}, {"text": "y"}]), [0, 1])[0]
    assert len(long["text"][0]) == 200


@pytest.mark.parametrize("numbers", [[], [3, 1]])
def test_the_table_of_a_recorded_run_has_the_chosen_rows(numbers: list[int]) -> None:
    run = wb.open_run(DATA / "demo.zarr")
    rows, constant, _ = metadata_table(run, numbers)
    assert rows["conversation"].tolist() == run.sequences.loc[numbers, "id"].tolist()
    assert "turns" in rows.columns or "turns" in constant or not numbers
