"""A linear probe of a label on recorded activations, tested on prompts that it was not fitted on.

Reference: Hewitt & Liang 2019, whose control task gives the selectivity.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.probes import bigrams, category_predictions, position_bins, previous_ids
from workbench.studies.run_index import independent_prompts
from workbench.studies.token_labels import Selection

_FOLDS = 5
_POSITION_BINS = 4
_CATEGORIES = ("token", "position", "bigram")  # what a label is also predicted from without the activation


def probe(
    run: Run,
    labels: str | pd.Series | Mapping[int, Any] | Sequence[Any],
    *,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    by: str | None = None,
    where: Selection | None = None,
    max_tokens: int = 4000,
    seed: int = 0,
) -> xr.Dataset:
    """Return how well a logistic probe reads a label from an activation, by layer: accuracy, baseline, selectivity.

    labels: "channel", "role", "part", "effort", "task", "correct", or a value for each sequence. by: also apart for
    each "position" (quarters of the positions), "part", "channel" or "role". where: only these tokens.

    accuracy is on prompts held out in five folds, baseline that of the most frequent label. control is the accuracy of
    a probe on Hewitt and Liang's control task, a random label for each token type, and selectivity accuracy less
    control. accuracy_token, accuracy_position and accuracy_bigram predict the label without the activation, from the
    token, its position, or the token and the one before it. Prompts with the same tokens are held out together.

    Raises:
        InputError: the activation was not recorded, or fewer than two labels or five prompts have it.
    """
    about = token_labels.recorded(run, hook)
    n_layers = int(run.model["n_layers"])
    wanted = list(about.layers) if layers is None else [layer % n_layers for layer in layers]
    results, groups = [], ["all"]
    for layer in wanted:
        x, table = _sample(
            run, about, token_labels.layer_index(about, layer, n_layers), labels, where, max_tokens, seed
        )
        group = _groups(table, by)
        groups = ["all", *dict.fromkeys(sorted(set(group), key=_order))] if by else ["all"]
        results.append(_scores(_right(x, table, seed), table["label"].to_numpy(), group, groups))
    names = ("accuracy", "baseline", "control", *(f"accuracy_{name}" for name in _CATEGORIES), "tokens")
    dim = by or "group"
    variables = {
        n: (("layer", dim), np.array([[r[g][i] for g in groups] for r in results])) for i, n in enumerate(names)
    }
    data = xr.Dataset(variables, coords={"layer": wanted, dim: groups})
    data["selectivity"] = data["accuracy"] - data["control"]
    data.attrs = {
        "run": run.path,
        "run_digest": run.digest,
        "title": f"Probe of {labels if isinstance(labels, str) else 'labels'}",
        "method": f"{about.name}, {_FOLDS} folds held out by prompt, at most {max_tokens} tokens, seed {seed}",
    }
    for name in (*names[:-1], "selectivity"):
        data[name].attrs = {"long_name": name.replace("accuracy_", "accuracy from the "), "units": "1"}
    return data


def _sample(
    run: Run, about: Any, index: int, labels: Any, where: Selection | None, max_tokens: int, seed: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the values of at most this many tokens with a label, and the labels; the same tokens for each layer."""
    parts: list[tuple[np.ndarray, pd.DataFrame]] = []
    for columns, values in token_labels.blocks(run, about, index):
        before = previous_ids(columns["id"].to_numpy(), columns["sequence"].to_numpy())
        table = columns.assign(label=token_labels.values_of(labels, columns, run), before=before)
        there = np.isfinite(values).all(1) & (table["label"] != "").to_numpy()
        if where is not None:
            there &= token_labels.mask(where, table, run.sequences)
        parts.append((values[there], table[there]))
    x, table = np.concatenate([p[0] for p in parts]), pd.concat([p[1] for p in parts], ignore_index=True)
    table["prompt"] = independent_prompts(run)[table["sequence"]]
    if table["label"].nunique() < 2:
        raise InputError(f"the tokens have {table['label'].nunique()} label: a probe needs two, see run.sequences")
    if table["prompt"].nunique() < _FOLDS:
        raise InputError(
            f"prompts with these labels: {table['prompt'].nunique()}, a probe needs {_FOLDS} to hold some out"
        )
    if len(table) > max_tokens:
        chosen = np.sort(np.random.default_rng(seed).choice(len(table), max_tokens, replace=False))
        x, table = x[chosen], table.iloc[chosen].reset_index(drop=True)
    return x, table


def _groups(table: pd.DataFrame, by: str | None) -> np.ndarray:
    if by is None:
        return np.full(len(table), "all", dtype=object)
    if by == "position":
        edges = np.unique(np.quantile(table["position"], np.linspace(0, 1, _POSITION_BINS + 1)).astype(int))
        which = np.clip(np.searchsorted(edges, table["position"], side="right") - 1, 0, max(len(edges) - 2, 0))
        return np.array([f"{edges[i]}–{edges[min(i + 1, len(edges) - 1)]}" for i in which], dtype=object)
    if by not in token_labels.TOKEN_LABELS:
        raise InputError(f"by={by!r}: use position, {', '.join(token_labels.TOKEN_LABELS)}, or leave it out")
    return np.array([*token_labels.TOKEN_LABELS[by], ""], dtype=object)[table[by].to_numpy(np.int64)]


def _order(name: str) -> tuple[int, str]:
    first = name.partition("–")[0]
    return (int(first), name) if first.isdecimal() else (0, name)


def _right(x: np.ndarray, table: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Return which held-out tokens the probe, its control task, and each category alone predict rightly [token]."""
    names, label = np.unique(table["label"].to_numpy(dtype=str), return_inverse=True)
    ids, prompts = table["id"].to_numpy(np.int64), table["prompt"].to_numpy()
    # as many labels as the property has, one for each token type
    types, which = np.unique(ids, return_inverse=True)
    random = np.random.default_rng(seed).permutation(np.arange(len(types)) % len(names))[which]
    right = {"accuracy": _predicted(x, label, prompts) == label, "control": _predicted(x, random, prompts) == random}
    categories = {
        "token": which,
        "position": position_bins(table["position"].to_numpy()),
        "bigram": bigrams(ids, table["before"].to_numpy()),
    }
    for name in _CATEGORIES:
        right[f"accuracy_{name}"] = category_predictions(categories[name], label, prompts) == label
    return right


def _predicted(
    x: Float[np.ndarray, "token d"], label: Int[np.ndarray, " token"], prompts: Int[np.ndarray, " token"]
) -> Int[np.ndarray, " token"]:
    """Return the label that a logistic probe fitted on other prompts gives each token."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted = np.empty_like(label)
    for train, test in StratifiedGroupKFold(_FOLDS).split(x, label, prompts):
        if len(set(label[train])) < 2:
            predicted[test] = label[train][0]
            continue
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x[train], label[train])
        predicted[test] = fitted.predict(x[test])
    return predicted


def _scores(
    right: Mapping[str, np.ndarray], label: np.ndarray, group: np.ndarray, groups: Iterable[str]
) -> dict[str, tuple[float, ...]]:
    """Return accuracy, baseline, control, the accuracies of the categories, and tokens of every group."""
    scores = {}
    for name in groups:
        own = np.ones(len(label), dtype=bool) if name == "all" else group == name
        n = int(own.sum())
        most = max(np.unique(label[own].astype(str), return_counts=True)[1]) / n if n else np.nan
        shares = {key: float(values[own].mean()) if n else np.nan for key, values in right.items()}
        of_categories = (shares[f"accuracy_{category}"] for category in _CATEGORIES)
        scores[name] = (shares["accuracy"], float(most), shares["control"], *of_categories, n)
    return scores
