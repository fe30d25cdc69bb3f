"""The tables of a run state what is known of its sequences before they are computed."""

import json

import numpy as np

from workbench.capture.plan import plan_units
from workbench.capture.tables import sequence_table
from workbench.harmony.transcripts import Transcript


def test_task_and_domain_are_columns_beside_the_metadata() -> None:
    """Readers of Zarr and xarray see them without reading JSON."""
    rows = [
        Transcript(f"t{i}", "p", "low", np.arange(4, dtype=np.int32), 2, meta=meta)
        for i, meta in enumerate(({"task": "sum", "domain": "arithmetic", "n": 3}, {}, {"task": 7}))
    ]
    table = sequence_table(rows, plan_units([4, 4, 4], 1024), [(), ("truncated",), ()])
    assert table["task"].tolist() == ["sum", "", "7"]
    assert table["domain"].tolist() == ["arithmetic", "", ""]
    assert [json.loads(meta) for meta in table["meta"]] == [row.meta for row in rows]
    assert table["flags"].tolist() == ["", "truncated", ""]
