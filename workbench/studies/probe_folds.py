"""Probes and baselines on held-out prompts: their AUC by fold, and its differences with jackknife intervals.

Rows (tokens or sequences) are split into five folds by prompt. A probe or a baseline is fitted on four folds and scored
on the fifth. The interval of an AUC leaves out one group of prompts at a time.

    folds = Folds(table, "token", seed=0)
    auc, control, hits, alarms = folds.activation(x, names, rate=0.05)

Reference: Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from workbench.studies.difference_tests import paired_test
from workbench.studies.intervals import within_bounds
from workbench.studies.probes import bigrams, control_labels, position_bins
from workbench.studies.result import Definition, Variables

FOLDS = 5
GROUPS = 20
_PENALTY = 0.1  # of the probe, times the number of rows
CI = f"95 %, delete-a-group jackknife over at most {GROUPS} groups of prompts, Student's t"
AUC_DEFINITIONS = {
    "auc": Definition("AUC", "1", "held out by prompt; several labels: mean over one against the rest", ci=CI),
    "beyond_words": Definition("AUC beyond the best baseline", "1", "AUC less that of the best baseline", ci=CI),
    "p": Definition("p", "1", "AUC is that of the best baseline, two-sided, Student's t", null="0"),
}
# an AUC, and the AUC without each group of prompts
Values = tuple[float, Float[np.ndarray, " group"]]


class Folds:
    """The folds of some labelled rows, shared by all layers and baselines.

    table: label, prompt, id, before (the id before it) and position of every row. pool: whether rows are tokens.
    """

    def __init__(self, table: pd.DataFrame, pool: str, seed: int) -> None:
        from sklearn.model_selection import StratifiedGroupKFold

        self.label = table["label"].to_numpy(dtype=object)
        prompts, self._prompt = np.unique(table["prompt"].to_numpy(dtype=object).astype(str), return_inverse=True)
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        self._splits = list(folds.split(np.zeros(len(table)), self.label.astype(str), self._prompt))
        self.fold = np.zeros(len(table), dtype=np.int64)
        for i, (_, test) in enumerate(self._splits):
            self.fold[test] = i
        rng = np.random.default_rng(seed)
        group = np.arange(len(prompts)) % min(GROUPS, len(prompts))
        self.group = rng.permutation(group)[self._prompt]
        ids, before = table["id"].to_numpy(np.int64), table["before"].to_numpy(np.int64)
        self._categories = {
            "token": np.unique(ids, return_inverse=True)[1],
            "position": np.asarray(position_bins(table["position"].to_numpy())),
            "bigram": bigrams(ids, before),
        }
        self._random = control_labels(ids if pool == "token" else self._prompt, rng)

    def activation(
        self, x: Float[np.ndarray, "row d"], names: Sequence[str], rate: float
    ) -> tuple[Values, Values, Float[np.ndarray, " label"], Float[np.ndarray, " label"]]:
        """Return the AUC of the probe and of the control task, and hits and false alarms at frozen thresholds."""
        truth = np.array([*(self.label == name for name in names), self._random])
        scores, thresholds = np.full(truth.shape, np.nan), np.full(truth.shape, np.nan)
        for train, test in self._splits:
            held, rest = _held_out(train, self._prompt)
            score = ridge(x[rest], truth[:, rest].T)
            possible = np.array([len(set(own[rest].tolist())) == 2 for own in truth])
            scores[np.ix_(possible, test)] = score(x[test]).T[possible]
            known = score(x[held]).T
            for i, own in enumerate(truth):
                if possible[i] and (~own[held]).any():
                    thresholds[i, test] = np.quantile(known[i][~own[held]], 1 - rate)
        above, known_at = scores > thresholds, np.isfinite(thresholds)
        cells = list(zip(above, truth, known_at, strict=True))[:-1]
        hits, alarms = ([_share(a[(t == side) & k]) for a, t, k in cells] for side in (True, False))
        control = self._auc(scores[-1:], truth[-1:])
        return self._auc(scores[:-1], truth[:-1]), control, np.array(hits), np.array(alarms)

    def category(self, source: str, names: Sequence[str]) -> Values:
        """Return the AUC of the share of the label among training rows of the same category."""
        category = self._categories[source]
        truth, n = np.array([self.label == name for name in names]), int(category.max()) + 1
        scores = np.zeros(truth.shape)
        for train, test in self._splits:
            counts = np.bincount(category[train], minlength=n)
            for i, own in enumerate(truth):
                positive = np.bincount(category[train], own[train], n)
                scores[i, test] = ((positive + own[train].mean()) / (counts + 1))[category[test]]
        return self._auc(scores, truth)

    def _auc(self, scores: Float[np.ndarray, "label row"], truth: Bool[np.ndarray, "label row"]) -> Values:
        """Return the mean over labels and folds of the AUC, with all rows and without each group of prompts."""
        groups = range(int(self.group.max()) + 1)
        selections = [np.ones(len(self.group), dtype=bool), *(self.group != g for g in groups)]
        aucs = [[_fold_auc(s, t, self.fold, keep) for keep in selections] for s, t in zip(scores, truth, strict=True)]
        values = np.nanmean(aucs, axis=0)
        return float(values[0]), np.asarray(values[1:])


def _fold_auc(score: np.ndarray, own: np.ndarray, fold: np.ndarray, keep: np.ndarray) -> float:
    """Return the mean over folds of the AUC, by ranks."""
    from scipy.stats import rankdata

    aucs = []
    for number in range(FOLDS):
        at = keep & (fold == number) & np.isfinite(score)
        n = int(own[at].sum())
        if 0 < n < at.sum():
            ranks = rankdata(score[at])[own[at]].sum()
            aucs.append((ranks - n * (n + 1) / 2) / (n * (at.sum() - n)))
    return float(np.mean(aucs)) if aucs else float("nan")


def _held_out(
    train: Int[np.ndarray, " row"], prompt: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " rest"]]:
    """Return the rows of every fourth training prompt, on which thresholds are set, and the others."""
    own = np.unique(prompt[train])
    held = np.isin(prompt[train], own[::4])
    return train[held], train[~held]


def ridge(
    x: Float[np.ndarray, "row d"], targets: Bool[np.ndarray, "row label"]
) -> Callable[[Float[np.ndarray, "other d"]], Float[np.ndarray, "other label"]]:
    """Return the scores that ridge regression on standardised activations gives to other rows, for all labels at once.

    The penalty is a tenth of the number of rows: about that of shrinking the covariance by a tenth of its mean.
    """
    mean, spread = x.mean(0), x.std(0)
    scale = np.where(spread > 0, spread, 1)
    z, y = ((x - mean) / scale).astype(np.float64), targets.astype(np.float64)
    penalty = _PENALTY * len(z)
    centred = y - y.mean(0)
    if len(z) < z.shape[1]:
        weights = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), centred)
    else:
        weights = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ centred)
    return lambda other: ((other - mean) / scale) @ weights


def _share(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def pseudo_values(values: Values) -> Float[np.ndarray, " group"]:
    """Return pseudo-values with the mean of the estimate, whose standard error is that of the jackknife."""
    estimate, without = values
    n = len(without)
    return np.asarray(estimate - (n - 1) * (without - without.mean()))


def auc_variables(dims: tuple[str, ...], pseudo: Float[np.ndarray, "group *cells"]) -> Variables:
    """Return the AUC of every cell with its limits, which stay between 0 and 1; dims: of the cells."""
    variables, _ = _with_limits("auc", dims, pseudo)
    auc, low, high = (values for _, values in variables.values())
    low, high = within_bounds(auc, low, high, len(pseudo))
    return {"auc": (dims, auc), "auc_low": (dims, low), "auc_high": (dims, high)}


def beyond_variables(dims: tuple[str, ...], differences: Float[np.ndarray, "group *cells"]) -> Variables:
    """Return the difference from the best baseline of every cell with its limits, p and q."""
    variables, tested = _with_limits("beyond_words", dims, differences)
    return variables | {name: (dims, np.asarray(tested[name])) for name in ("p", "q")}


def gain_variables(dims: tuple[str, ...], differences: Float[np.ndarray, "group *cells"]) -> Variables:
    """Return the difference from an earlier AUC of every cell with its limits."""
    return _with_limits("gain", dims, differences)[0]


def _with_limits(
    name: str, dims: tuple[str, ...], pseudo: Float[np.ndarray, "group *cells"]
) -> tuple[Variables, dict[str, Any]]:
    tested = paired_test(pseudo)
    keys = {name: "difference", f"{name}_low": "low", f"{name}_high": "high"}
    return {variable: (dims, np.asarray(tested[key])) for variable, key in keys.items()}, tested
