"""The tables of a run that are known before the first forward pass: its sequences and their messages."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from workbench.harmony.labels import Labels
from workbench.harmony.transcripts import Transcript
from workbench.runs.schema import Layout


def sequence_table(rows: Sequence[Transcript], layout: Layout, flags: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Return the table `sequences` of a run: a row for each transcript."""
    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "prompt_id": [row.prompt_id for row in rows],
            "effort": [row.effort for row in rows],
            "offset": layout.offsets,
            "length": layout.lengths,
            "n_prompt": [row.n_prompt for row in rows],
            "correct": np.array([-1 if row.correct is None else int(row.correct) for row in rows], dtype=np.int8),
            "answer": [row.answer or "" for row in rows],
            "meta": [json.dumps(row.meta, sort_keys=True) for row in rows],
            "flags": [" ".join(names) for names in flags],
            # of the metadata also as columns, which readers of Zarr and xarray see
            **{name: [str(row.meta.get(name, "")) for row in rows] for name in ("task", "domain")},
        }
    )


def message_table(labels: Iterable[Labels]) -> pd.DataFrame:
    """Return the table `messages` of a run: a row for each message, positions relative to its sequence."""
    columns = ("role", "author", "channel", "recipient", "content_type", "start", "content", "stop", "end", "closed_by")
    return pd.DataFrame(
        [
            {"sequence": s, **{c: getattr(m, c) for c in columns}, "flags": " ".join(m.flags)}
            for s, label in enumerate(labels)
            for m in label.messages
        ]
    )
