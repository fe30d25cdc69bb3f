"""A linear probe of a label on recorded activations, tested on prompts that it was not fitted on.

Reference: Hewitt & Liang 2019, whose control task gives the selectivity.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.errors import InputError
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.token_labels import Selection

_FOLDS = 5
_POSITION_BINS = 4


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

    accuracy is on prompts held out in five folds, baseline that of the most frequent label, control that of a probe of
    labels shuffled between prompts, and selectivity accuracy less control. Labels of tokens that differ in words or
    position can be read from those: compare within `by`.

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
        predicted, control, truth = _predicted(x, table, seed)
        results.append(_scores(predicted, control, truth, table["label"].to_numpy(), group, groups))
    names = ("accuracy", "baseline", "control", "tokens")
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
    for name in ("accuracy", "baseline", "control", "selectivity"):
        data[name].attrs = {"long_name": name, "units": "1"}
    return data


def _sample(
    run: Run, about: Any, index: int, labels: Any, where: Selection | None, max_tokens: int, seed: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the values of at most so many tokens that have a label, and the labels; the same tokens for each layer."""
    parts: list[tuple[np.ndarray, pd.DataFrame]] = []
    for columns, values in token_labels.blocks(run, about, index):
        table = columns.assign(label=token_labels.named(labels, columns, run))
        there = np.isfinite(values).all(1) & (table["label"] != "").to_numpy()
        if where is not None:
            there &= token_labels.mask(where, table, run.sequences)
        parts.append((values[there], table[there]))
    x, table = np.concatenate([p[0] for p in parts]), pd.concat([p[1] for p in parts], ignore_index=True)
    table["prompt"] = run.sequences["prompt_id"].reindex(table["sequence"]).to_numpy()
    if table["label"].nunique() < 2:
        raise InputError(f"the tokens have {table['label'].nunique()} label: a probe needs two, see run.sequences")
    if table["prompt"].nunique() < _FOLDS:
        raise InputError(
            f"{table['prompt'].nunique()} prompts have these labels: a probe needs {_FOLDS} to hold some out"
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


def _predicted(x: np.ndarray, table: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the held-out predictions of the label, those of the control, and the control's own labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    label = table["label"].to_numpy(dtype=object)
    prompts = table["prompt"].to_numpy()
    # the control's label belongs to a prompt and a true label, at random
    key, which = np.unique(np.array([f"{p}\t{t}" for p, t in zip(prompts, label, strict=True)]), return_inverse=True)
    shuffled = np.random.default_rng(seed).choice(label, len(key))[which]
    predicted, control = np.empty(len(label), dtype=object), np.empty(len(label), dtype=object)
    for train, test in StratifiedGroupKFold(_FOLDS).split(x, label, prompts):
        for truth, into in ((label, predicted), (shuffled, control)):
            if len(set(truth[train])) < 2:
                into[test] = truth[train][0]
                continue
            fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
                x[train], truth[train]
            )
            into[test] = fitted.predict(x[test])
    return predicted, control, shuffled


def _scores(
    predicted: np.ndarray,
    control: np.ndarray,
    shuffled: np.ndarray,
    label: np.ndarray,
    group: np.ndarray,
    groups: Iterable[str],
) -> dict[str, tuple[float, float, float, int]]:
    """Return accuracy, baseline, control and tokens of every group."""
    found = {}
    for name in groups:
        own = np.ones(len(label), dtype=bool) if name == "all" else group == name
        n = int(own.sum())
        most = max(np.unique(label[own].astype(str), return_counts=True)[1]) / n if n else np.nan
        right, chance = (
            float((p[own] == t[own]).mean()) if n else np.nan for p, t in ((predicted, label), (control, shuffled))
        )
        found[name] = (right, float(most), chance, n)
    return found
