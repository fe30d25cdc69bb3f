"""The table of conversations: what a run recorded about each, its own columns and all fields of its metadata."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from workbench.bounded_json import parse_json
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.runs import Run

MAX_FIELDS = 40  # of the metadata; a file can have a field of its own in every row
_MAX_TEXT = 200  # characters of a value
GRADES = {1: "correct", 0: "wrong"}
_OWN = ("task", "domain", "expected")  # columns that the run makes from the metadata


def metadata_table(run: Run, numbers: Sequence[int]) -> tuple[pd.DataFrame, dict[str, str], int]:
    """Return a row for each conversation, the fields with one value in all rows, and the number of fields left out.

    numbers: of the conversations, in the order of the rows. A field of a field is a column "field.inner"; numbers stay
    numbers, so that they are sorted as such; of more than `MAX_FIELDS` fields the most frequent are taken.
    """
    listed = run.sequences.loc[list(numbers)]
    own = {
        "conversation": listed["id"].astype(str),
        "task": listed["task"].astype(str),
        "domain": listed["domain"].astype(str),
        "effort": listed["effort"].astype(str),
        "prompt tokens": listed["n_prompt"].astype(int),
        "answer tokens": (listed["length"] - listed["n_prompt"]).astype(int),
        "expected": listed["expected"].astype(str),
        "grade": listed["correct"].map(lambda value: GRADES.get(int(value), "")),
    }
    if "flags" in listed:
        own["irregularities"] = listed["flags"].map(_flag_words)
    if not all(id.startswith(f"{prompt}/") for id, prompt in zip(listed["id"], listed["prompt_id"], strict=True)):
        own["prompt"] = listed["prompt_id"].astype(str)
    fields = [_flat(parse_json(text)) for text in listed["meta"].astype(str)]
    counts = Counter(name for row in fields for name in row)
    names = [name for name, _ in counts.most_common(MAX_FIELDS)]
    rows = pd.DataFrame(own).reset_index(drop=True)
    for name in names:
        column = name if name not in rows else f"{name} (metadata)"
        rows[column] = _column([row.get(name) for row in fields])
    rows = rows[[name for name in rows if name == "conversation" or _has_values(rows[name])]]
    constant = {}
    if len(rows) > 1:
        constant = {str(name): str(rows[name].iloc[0]) for name in rows if rows[name].nunique(dropna=False) == 1}
    return rows.drop(columns=list(constant)), constant, len(counts) - len(names)


def _flag_words(flags: Any) -> str:
    return ", ".join(SEQUENCE_FLAGS.get(flag, flag) for flag in str(flags).split())


def _flat(meta: Any) -> dict[str, Any]:
    """Return the fields of metadata by name; those of an object in it are "object.field"."""
    if not isinstance(meta, dict):
        return {}
    flat: dict[str, Any] = {}
    for name, value in meta.items():
        if name in _OWN:
            continue
        inner = value if isinstance(value, dict) and value else {"": value}
        flat |= {f"{name}.{key}" if key else str(name): one for key, one in inner.items()}
    return flat


def _column(values: list[Any]) -> "pd.Series[Any]":
    """Return the values of a field as numbers if all are, otherwise as texts; "" or NaN where there is none."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        column = pd.Series([float("nan") if value is None else float(value) for value in values])
        whole_numbers = len(known) == len(values) and all(float(value).is_integer() for value in known)
        return column.astype(int) if whole_numbers and column.abs().max() < 2**53 else column
    return pd.Series([_text(value) for value in values], dtype=str)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _has_values(column: "pd.Series[Any]") -> bool:
    """Return whether a column has a value in any row."""
    return bool(column.notna().any() and (column.astype(str) != "").any())
