"""Controls of probes: what a probe's AUC means beside memorized token types, the token itself, its position and bigram.

The control task of Hewitt and Liang gives every token type a random label. A probe that does well on it has learned
token types by heart, so selectivity is the AUC on the property less the AUC on the control. The baselines predict the
property without activations, from counts in the training folds.

Reference: Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

FOLDS = 5
_POSITION_BINS = 20


def control_labels(ids: Int[np.ndarray, " token"], rng: np.random.Generator) -> Bool[np.ndarray, " token"]:
    """Return a random label for each token type, the same wherever the type occurs; half of the types have each."""
    types, of = np.unique(ids, return_inverse=True)
    labels = rng.permutation(np.arange(len(types)) % 2 == 0)
    return np.asarray(labels[of])


def previous_ids(ids: Int[np.ndarray, " token"], sequence: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """Return the token before each token in its sequence; −1 at the beginning."""
    before = np.roll(ids.astype(np.int64), 1)
    before[np.flatnonzero(np.diff(sequence, prepend=-2))] = -1
    return before


def position_bins(position: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """Return positions in twenty bins with about as many tokens each."""
    edges = np.quantile(position, np.linspace(0, 1, _POSITION_BINS + 1)[1:-1])
    return np.searchsorted(np.unique(edges), position, side="right")


def bigrams(ids: Int[np.ndarray, " token"], before: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """Return a number for each pair of a token and the one before it."""
    return np.unique(np.stack([before, ids]), axis=1, return_inverse=True)[1].reshape(-1)


def category_predictions(
    category: Int[np.ndarray, " token"], label: Int[np.ndarray, " token"], group: Int[np.ndarray, " token"]
) -> Int[np.ndarray, " token"]:
    """Return the held-out prediction of a label from a category alone, folds split by group.

    It is the most frequent label of the category's training tokens, and of all where these have none.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    predicted = np.empty_like(label)
    shape = (int(category.max()) + 1, int(label.max()) + 1)
    for train, test in StratifiedGroupKFold(FOLDS).split(category, label, group):
        counts = np.zeros(shape)
        np.add.at(counts, (category[train], label[train]), 1.0)
        predicted[test] = (counts + counts.mean(0) / len(train)).argmax(1)[category[test]]
    return predicted


def category_auc(
    category: Int[np.ndarray, " token"], label: Bool[np.ndarray, " token"], group: Int[np.ndarray, " token"]
) -> Float[np.ndarray, " fold"]:
    """Return the AUC of each fold of predicting a label from a category alone, folds split by group.

    The score is the share of the label among the training tokens of the category, with one pseudo-token of the mean.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    n, scores = int(category.max()) + 1, []
    for train, test in StratifiedGroupKFold(FOLDS).split(category, label, group):
        if len(set(label[train].tolist())) < 2 or len(set(label[test].tolist())) < 2:
            continue
        counts = np.bincount(category[train], minlength=n)
        positive = np.bincount(category[train], weights=label[train], minlength=n)
        share = (positive + label[train].mean()) / (counts + 1)
        scores.append(float(roc_auc_score(label[test], share[category[test]])))
    return np.array(scores or [np.nan])
