"""Labels of experts: a file beside the run with one line for each expert, which people and programs may edit.

    labels = expert_labels.read(run)            # one row per expert; automatic lines where there is no file
    expert_labels.update(run, labels)           # RUN.labels.jsonl; labels that people wrote stay

A row holds `layer`, `expert`, `label` (what is shown), `automatic` (made from the run, see `expert_examples`),
`proposed` (by a model, see `label_proposals`) with its held-out detection score, and `proposed_by`. A label that is
neither empty nor the automatic nor the proposed one was written by a person; programs keep it.
"""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.errors import InputError
from workbench.outputs import check_output, staged
from workbench.studies.label_files import cleaned, objects, path_beside

COLUMNS = (
    "layer",
    "expert",
    "label",
    "automatic",
    "proposed",
    "proposed_by",
    "score",
    "score_low",
    "score_high",
    "scored",
)
_TEXTS = ("label", "automatic", "proposed", "proposed_by")
_NUMBERS = ("score", "score_low", "score_high", "scored")


def path_of(run: Any) -> Path:
    """Return the path of the labels of a run: beside it, `RUN.labels.jsonl`.

    Raises:
        InputError: the run is on an object storage.
    """
    return path_beside(run, "labels.jsonl")


def automatic(examples: xr.Dataset) -> pd.DataFrame:
    """Return a row for each expert with its automatic label, from the dataset of `expert_examples.load`."""
    table = examples["automatic_label"].to_dataframe(name="automatic").reset_index()
    rows = table.assign(label=table["automatic"], proposed="", proposed_by="", **dict.fromkeys(_NUMBERS, np.nan))
    return rows[list(COLUMNS)]


def read(run: Any, path: str | Path | None = None) -> pd.DataFrame | None:
    """Return the labels of a run, or None if it has no file of them.

    path: another file.

    Raises:
        InputError: a line is not a label of one of the run's experts, or an expert has two.
    """
    if path is None and "://" in str(run.path):
        return None
    file = path_of(run) if path is None else Path(path)
    if not file.is_file():
        if path is not None:
            raise InputError(f"{file} is not a file of labels")
        return None
    rows = [_row(run, where, row) for where, row in objects(file, '{"layer": 0, "expert": 3, "label": "digits"}')]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if (twice := table[table.duplicated(["layer", "expert"])]).size:
        raise InputError(f"{file}: layer {twice['layer'].iloc[0]} expert {twice['expert'].iloc[0]} has two labels")
    return table


def _row(run: Any, where: str, row: dict[str, Any]) -> dict[str, Any]:
    for name, size in (("layer", run.model["n_layers"]), ("expert", run.model["num_experts"])):
        if type(row.get(name)) is not int or not 0 <= row[name] < size:
            raise InputError(f"{where}: {name} is {row.get(name)!r}, expected 0 to {size - 1}")
    for name in _TEXTS:
        if not isinstance(row.setdefault(name, ""), str):
            raise InputError(f"{where}: {name} is {row[name]!r}, expected a text")
    for name in _NUMBERS:
        value = row.setdefault(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{where}: {name} is {value!r}, expected a number or null")
        row[name] = np.nan if value is None else float(value)
    row["label"] = cleaned(row["label"])
    return {name: row[name] for name in COLUMNS}


def is_edited(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether each label was written by a person: neither empty nor the automatic nor the proposed one."""
    label = rows["label"]
    return (label != "") & (label != rows["automatic"].map(cleaned)) & (label != rows["proposed"])


def merged(old: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """Return new labels with those that people wrote in `old`, and its proposals where `new` has none."""
    if old is None:
        return new
    keys = ["layer", "expert"]
    old_rows = old.assign(edited=is_edited(old)).set_index(keys).reindex(pd.MultiIndex.from_frame(new[keys]))
    result = new.copy()
    proposed_before = (old_rows["proposed"].fillna("") != "").to_numpy() & (new["proposed"] == "").to_numpy()
    for name in ("proposed", "proposed_by", *_NUMBERS):
        result[name] = np.where(proposed_before, old_rows[name].to_numpy(), new[name].to_numpy())
    result.loc[proposed_before, "label"] = result.loc[proposed_before, "proposed"]
    edited = old_rows["edited"].fillna(False).to_numpy(dtype=bool)
    result.loc[edited, "label"] = old_rows["label"].to_numpy()[edited]
    return result


def check(run: Any) -> Path:
    """Return the path of the labels of a run, after a check that they may be written there.

    Raises:
        InputError: the run is on an object storage, or something else than labels of the run is at the path.
    """
    path = check_output(path_of(run), command="label", inputs=[run.path], overwrite=True, owned=Path.is_file)
    read(run)
    return path


def write(run: Any, labels: pd.DataFrame, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the labels beside the run, or to another file; the file appears complete or not at all.

    Labels that people wrote into an earlier file are replaced unless they are in `labels`: see `update`.

    Raises:
        InputError: the path cannot be a file, or another process writes it.
    """
    file = path_of(run) if path is None else Path(path)
    with _staged(run, file) as part:
        part.write_text(_text(labels), encoding="utf-8")
    return file


def update(run: Any, labels: pd.DataFrame) -> pd.DataFrame:
    """Write new labels beside the run, with what people wrote there meanwhile, and return all of them.

    Raises:
        InputError: the file holds something else than labels of the run, or another process writes it.
    """
    with _staged(run, path_of(run)) as part:
        updated = merged(read(run), labels)
        part.write_text(_text(updated), encoding="utf-8")
    return updated


def _staged(run: Any, file: Path) -> AbstractContextManager[Path]:
    # every line states which expert it labels, so the content shows whether the file may be replaced, not a marker
    return staged(file, command="label", inputs=[run.path], overwrite=True, owned=lambda path: _holds_labels(run, path))


def _holds_labels(run: Any, path: Path) -> bool:
    try:
        return read(run, path) is not None
    except InputError:
        return False


def _text(labels: pd.DataFrame) -> str:
    """Return labels as JSON Lines."""
    lines = []
    for row in labels[list(COLUMNS)].to_dict("records"):
        plain = {str(k): None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
        plain["label"] = cleaned(str(plain["label"]))
        lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def with_labels(examples: xr.Dataset, labels: pd.DataFrame | None) -> xr.Dataset:
    """Return the examples with `label`, `label_score` and its limits from these labels, where they have some."""
    if labels is None:
        return examples
    labelled = examples.copy()
    shown = labelled["label"].values.copy()
    scores = {name: np.full(shown.shape, np.nan) for name in ("score", "score_low", "score_high")}
    for row in labels.to_dict("records"):
        place = int(row["layer"]), int(row["expert"])
        shown[place] = row["label"] or shown[place]
        if row["label"] == row["proposed"]:  # the score is that of the proposal
            for name, values in scores.items():
                values[place] = row[name]
    labelled["label"] = (("layer", "expert"), shown, labelled["label"].attrs)
    for name, values in scores.items():
        labelled[f"label_{name}"] = (("layer", "expert"), values, labelled[f"label_{name}"].attrs)
    return labelled
