"""Labels of recorded features: automatic ones from their strongest tokens, and a file beside the run for people's own.

    feature_labels.automatic(run, "blocks.2.hook_resid_post")     # one text for each feature
    feature_labels.read(run)                                      # {(name, layer, feature): label}, of people
    feature_labels.put(run, "blocks.2.hook_resid_post", 2, 77, "carry digit")

An automatic label is made of the tokens with a feature's largest activations in content, the strongest first. Labels of
experts are in a file of their own (`expert_labels`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, FRAME
from workbench.outputs import staged
from workbench.runs import conversations, feature_examples
from workbench.studies import token_labels
from workbench.studies.label_files import cleaned, objects, path_beside

TOKENS = 3  # of an automatic label
_PLACES = 8  # strongest tokens of a feature, among which are those of its label
_TYPES = {"name": str, "layer": int, "feature": int, "label": str}
_EXAMPLE = '{"name": "…", "layer": 2, "feature": 7, "label": "…"}'
Labels = dict[tuple[str, int, int], str]


def automatic(run: Any, name: str, index: int = 0, *, most: int = 300_000, tokenizer: Any = None) -> list[str]:
    """Return a label for each feature: the different tokens of its largest activations; "" without any.

    name: of the autoencoder's hook point or of the recorded quantity. index: of the layer among the recorded ones.
    most: tokens that are read of a quantity that is recorded at every token. tokenizer: if that of the run is not
    installed.

    Raises:
        InputError: the run's tokenizer is not known.
    """
    listed = name in {lists.hook for lists in run.spec.features}
    ids = _listed_tokens(run, name) if listed else _recorded_tokens(run, name, index, most)
    words = conversations.tokenizer(run, tokenizer)
    texts = {i: words.decode([i]) for i in np.unique(ids).tolist() if i >= 0}
    labels = []
    for row in ids.tolist():
        different = list(dict.fromkeys(repr(texts[i]) for i in row if i >= 0))
        labels.append(cleaned(" ".join(different[:TOKENS])))
    return labels


def _listed_tokens(run: Any, name: str) -> Int[np.ndarray, "feature place"]:
    """Return the ids of the strongest tokens of content of each feature, the strongest first; −1: none."""
    lists = feature_examples.of_run(run, name)
    content = [c for c in range(len(CHANNELS)) if c != FRAME]
    flat = {
        part: np.moveaxis(lists[f"top_{part}"][content], 0, 1).reshape(lists["top_activation"].shape[1], -1)
        for part in ("activation", "sequence", "position")
    }
    order = np.argsort(-flat["activation"], axis=1, kind="stable")[:, :_PLACES]
    sequence, position = (np.take_along_axis(flat[part], order, 1) for part in ("sequence", "position"))
    blocks = [(block["sequence"], block["id"]) for block in run.blocks("id")]
    owner, ids = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    row = np.searchsorted(owner, np.maximum(sequence, 0)) + np.maximum(position, 0)
    return np.where(sequence >= 0, ids[np.minimum(row, len(ids) - 1)], -1)


def _recorded_tokens(run: Any, name: str, index: int, most: int) -> Int[np.ndarray, "feature place"]:
    """Return the same of features that are recorded at every token."""
    values: Float[np.ndarray, "feature place"] | None = None
    ids: Int[np.ndarray, "feature place"] | None = None
    seen = 0
    for labels, block in token_labels.blocks(run, token_labels.recorded(run, name), index):
        own = np.nan_to_num(block).T * (labels["channel"].to_numpy() != FRAME)
        order = np.argsort(-own, axis=1, kind="stable")[:, :_PLACES]
        top, tokens = np.take_along_axis(own, order, 1), labels["id"].to_numpy()[order]
        values = top if values is None else np.concatenate([values, top], 1)
        ids = tokens if ids is None else np.concatenate([ids, tokens], 1)
        best = np.argsort(-values, axis=1, kind="stable")[:, :_PLACES]
        values, ids = np.take_along_axis(values, best, 1), np.take_along_axis(ids, best, 1)
        if (seen := seen + len(labels)) >= most:
            break
    if values is None or ids is None:
        return np.empty((0, _PLACES), dtype=np.int64)
    return np.where(values > 0, ids, -1)


def path_of(run: Any) -> Path:
    """Return the path of the labels of a run's features: beside it, `RUN.feature-labels.jsonl`.

    Raises:
        InputError: the run is on an object storage.
    """
    return path_beside(run, "feature-labels.jsonl")


def read(run: Any) -> Labels:
    """Return the labels that people gave the run's features, by (name, layer, feature); none without a file.

    Raises:
        InputError: a line of the file is no label of a feature, or a feature has two.
    """
    if "://" in str(run.path) or not (file := path_of(run)).is_file():
        return {}
    labels: Labels = {}
    for where, row in objects(file, _EXAMPLE):
        if any(type(row.get(key)) is not kind for key, kind in _TYPES.items()):
            raise InputError(f"{where}: expected an object such as {_EXAMPLE}")
        key = row["name"], row["layer"], row["feature"]
        if key in labels:
            raise InputError(f"{where}: feature {key[2]} of {key[0]}, layer {key[1]}, has a label already: remove one")
        labels[key] = cleaned(row["label"])
    return labels


def put(run: Any, name: str, layer: int, feature: int, label: str) -> Path:
    """Write the label of a feature into the file beside the run, and return its path; an empty label removes it.

    Raises:
        InputError: the file holds something else, or cannot be written.
    """
    file = path_of(run)

    def holds_labels(_: Path) -> bool:
        try:
            read(run)
        except InputError:
            return False
        return True

    with staged(file, command="dashboard", inputs=[run.path], overwrite=True, owned=holds_labels) as part:
        labels = {**read(run), (name, layer, feature): cleaned(label)}
        part.write_text(_text(labels), encoding="utf-8")
    return file


def _text(labels: Mapping[tuple[str, int, int], str]) -> str:
    rows = [
        {"name": name, "layer": layer, "feature": feature, "label": label}
        for (name, layer, feature), label in sorted(labels.items())
        if label
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
