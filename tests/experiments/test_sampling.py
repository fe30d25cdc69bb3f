"""Samples are spread over tasks and efforts, whatever order the run has."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

import workbench as wb
from tests.conftest import DATA
from workbench.experiments.from_run import transcripts
from workbench.experiments.registry import chosen_sequences
from workbench.experiments.sampling import composition, halves, spread, spread_rows


def test_every_stratum_gets_as_many_as_it_can() -> None:
    strata = ["a"] * 50 + ["b"] * 4 + ["c"] * 30
    chosen = spread(strata, 24)
    assert len(set(chosen)) == 24
    counts = pd.Series([strata[i] for i in chosen]).value_counts()
    assert counts.to_dict() == {"a": 10, "c": 10, "b": 4}
    assert spread(strata, 1000) == list(range(84))
    assert len({strata[i] for i in spread(strata, 2)}) == 2


def test_a_sample_of_the_demo_has_every_task_and_effort() -> None:
    rows = transcripts(wb.open_run(DATA / "demo.zarr"))
    counts = composition([rows[i] for i in spread_rows(rows, 60)])
    assert len(counts) == 30
    assert set(counts.values()) == {2}
    assert len(composition(rows[:60])) == 3, "negative control: the first sequences are of one task"
    first, second = halves(rows)
    assert composition(first) == composition(second)
    assert not {row.prompt_id for row in first} & {row.prompt_id for row in second}


def test_sequences_are_chosen_evenly_where_the_order_of_the_run_would_mislead() -> None:
    """Tasks that alternate with the stride of an evenly spaced sample: such a sample has one task, this one has all."""
    n = 400
    table = pd.DataFrame(
        {
            "id": [f"s{i}" for i in range(n)],
            "prompt_id": [f"p{i}" for i in range(n)],
            "effort": ["low", "high"] * (n // 2),
            "length": 10,
            "task": [f"t{i % 10}" for i in range(n)],
        }
    )
    chosen = chosen_sequences(SimpleNamespace(sequences=table, path="run"), 100, 40)  # type: ignore[arg-type]
    counts = table.loc[chosen].groupby(["task", "effort"]).size()
    assert counts.to_list() == [4] * 10
    evenly = np.unique(np.linspace(0, n - 1, 40).round().astype(int))
    assert table.loc[evenly].groupby(["task", "effort"]).size().std() > 0.5, "negative control"
