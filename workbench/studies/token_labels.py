"""Tokens of a run chosen by label, and the labels of its tokens by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, PARTS, ROLES
from workbench.harmony.token_sets import TokenSet
from workbench.runs import Run
from workbench.runs.schema import Activation, Record

TOKEN_LABELS = {"channel": CHANNELS, "role": ROLES, "part": PARTS}
SEQUENCE_LABELS = ("effort", "task", "domain", "correct", "prompt_id", "id")
# names of labels, as {"channel": "final"}; a channel's name alone; a token set
Selection = Mapping[str, Any] | str | TokenSet


def selection_of(text: Selection) -> Selection:
    """Return a selection written as text, "channel=final,effort=low|high", as a mapping; others as they are.

    Raises:
        InputError: a part of the text is not NAME=VALUE, or names a label twice.
    """
    if not isinstance(text, str):
        return text
    if "=" not in text:
        return {"channel": text}
    selection: dict[str, list[Any]] = {}
    for part in text.split(","):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        if not equals or not values or name in selection:
            raise InputError(f"{text!r}: expected NAME=VALUE, each name once, as in channel=final,effort=low|high")
        selection[name] = [
            int(v) if name in ("position", "correct") and v.isdecimal() else v for v in values.split("|")
        ]
    return selection


def recorded(run: Run, hook: str) -> Activation | Record:
    """Return the record of a run with this name; the prefix `hook_` is optional.

    Raises:
        InputError: the run recorded no values of single tokens by this name.
    """
    plain = hook.replace("hook_", "")
    for about in run.spec.selected:
        if about.name.replace("hook_", "") == plain and about.per_token:
            return about
    names = [a.name.replace("hook_", "") for a in run.spec.selected if a.per_token]
    raise InputError(
        f"{hook!r} is not in {run.path}: it has {', '.join(names) or 'no activations of single tokens'}; record it "
        f"with --record {plain}"
    )


def layer_index(about: Activation | Record, layer: int, n_layers: int) -> int:
    """Return the place of a layer among those recorded; −1 is the model's last.

    Raises:
        InputError: the layer was not recorded.
    """
    if layer % n_layers not in about.layers or not -n_layers <= layer < n_layers:
        raise InputError(f"layer {layer} of {about.name} was not recorded: it has {', '.join(map(str, about.layers))}")
    return about.layers.index(layer % n_layers)


def blocks(run: Run, about: Activation | Record, index: int) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Yield the labels of a unit's tokens and their values [token, d] of one layer, NaN where none was recorded."""
    names = ["id", "role", "part", about.name]
    for block in run.blocks(*names, layer=index):
        values = np.asarray(block[about.name][0], dtype=np.float32)
        labels = pd.DataFrame({k: block[k] for k in ("sequence", "position", "channel", "role", "part", "id")})
        yield labels, values.reshape(len(labels), -1)


def mask(selection: Selection, labels: pd.DataFrame, sequences: pd.DataFrame) -> np.ndarray:
    """Return which tokens [token] a selection contains.

    Raises:
        InputError: a label or one of its names is unknown.
    """
    if isinstance(selection, str):
        selection = {"channel": selection}
    if isinstance(selection, TokenSet):
        parts = [selection(own["id"].to_numpy()) for _, own in labels.groupby("sequence", sort=False)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)
    chosen = np.ones(len(labels), dtype=bool)
    for name, wanted in selection.items():
        values = [wanted] if isinstance(wanted, str | int | bool) else list(wanted)
        if name in TOKEN_LABELS:
            if unknown := [v for v in values if v not in TOKEN_LABELS[name]]:
                raise InputError(f"{name} {unknown[0]!r}: choose from {', '.join(TOKEN_LABELS[name])}")
            chosen &= np.isin(labels[name], [TOKEN_LABELS[name].index(v) for v in values])
        elif name == "position":
            chosen &= np.isin(labels[name], values)
        elif name in SEQUENCE_LABELS:
            known = sequences[name]
            if unknown := [v for v in values if v not in set(known)]:
                raise InputError(f"{name} {unknown[0]!r}: the run has {', '.join(map(str, sorted(set(known))[:10]))}")
            chosen &= known.isin(values).reindex(labels["sequence"]).to_numpy(dtype=bool)
        else:
            raise InputError(f"{name!r} is not a label: use {', '.join((*TOKEN_LABELS, 'position', *SEQUENCE_LABELS))}")
    return chosen


def values_of(label: str | pd.Series | Mapping[int, Any] | Sequence[Any], labels: pd.DataFrame, run: Run) -> np.ndarray:
    """Return the label of each token [token] as text, "" where there is none.

    label: a column's name, or a value for each sequence: by its number, or in the order of `run.sequences`.

    Raises:
        InputError: the label is unknown, or the number of values is wrong.
    """
    if isinstance(label, str):
        if label in TOKEN_LABELS:
            return np.array([*TOKEN_LABELS[label], ""], dtype=object)[labels[label].to_numpy(np.int64)]
        if label not in run.sequences:
            names = ", ".join((*TOKEN_LABELS, *SEQUENCE_LABELS))
            raise InputError(f"{label!r} is not a label: use {names}, or a value for each sequence")
        column = run.sequences[label]
        column = column.map({1: "correct", 0: "wrong"}) if label == "correct" else column
    elif isinstance(label, pd.Series):
        column = label
    elif isinstance(label, Mapping):
        column = pd.Series(dict(label))
    else:
        if len(label) != len(run.sequences):
            raise InputError(
                f"{len(label)} labels for {len(run.sequences)} sequences: give one for each, in their order"
            )
        column = pd.Series(list(label), index=run.sequences.index)
    return column.reindex(labels["sequence"]).fillna("").astype(str).to_numpy(dtype=object)


def selection_text(selection: Selection) -> str:
    """Return a selection as it is written on the command line."""
    if not isinstance(selection, Mapping):
        return str(selection)
    values = {k: [v] if isinstance(v, str | int | bool) else list(v) for k, v in selection.items()}
    return ",".join(f"{name}={'|'.join(map(str, wanted))}" for name, wanted in values.items())
