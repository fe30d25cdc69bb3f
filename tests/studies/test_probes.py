"""The control task and the baselines of probes see what they are for."""

import numpy as np

from workbench.studies.channels import probe_auc
from workbench.studies.probes import (
    bigrams,
    category_auc,
    category_predictions,
    control_labels,
    position_bins,
    previous_ids,
)


def test_a_control_label_belongs_to_a_token_type() -> None:
    ids = np.random.default_rng(0).integers(0, 30, 5000)
    labels = control_labels(ids, np.random.default_rng(1))
    for token in range(30):
        assert len(set(labels[ids == token].tolist())) == 1
    assert abs(labels.mean() - 0.5) < 0.1


def test_a_probe_that_reads_token_types_alone_has_no_selectivity() -> None:
    """Negative control: against a random label of each token, as AUC less one half, it looks selective."""
    rng = np.random.default_rng(0)
    ids, prompt = rng.integers(0, 20, 1500), np.repeat(np.arange(30), 50)
    x = np.eye(20)[ids] + rng.normal(0, 0.1, (1500, 20))
    label = ids < 10
    auc = np.mean(probe_auc(x, label, prompt))
    control = np.mean(probe_auc(x, control_labels(ids, rng), prompt))
    assert auc > 0.95
    assert abs(auc - control) < 0.05
    meaningless = np.mean(probe_auc(x, rng.random(1500) < 0.5, prompt))
    assert auc - meaningless > 0.35, "negative control"


def test_baselines_find_what_is_planted_in_them_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    ids, sequence = rng.integers(0, 6, 4000), np.repeat(np.arange(80), 50)
    position, before = np.tile(np.arange(50), 80), previous_ids(ids, sequence)
    assert (before[::50] == -1).all()
    assert before[51] == ids[50]
    pairs = bigrams(ids, before)
    repeats = ids == before
    assert category_auc(pairs, repeats, sequence).mean() > 0.99
    assert abs(category_auc(ids, repeats, sequence).mean() - 0.5) < 0.06
    assert category_auc(ids, ids == 3, sequence).mean() > 0.99
    assert category_auc(position_bins(position), position > 30, sequence).mean() > 0.95
    assert abs(category_auc(ids, position > 30, sequence).mean() - 0.5) < 0.06


def test_predictions_from_a_category_are_of_held_out_groups() -> None:
    rng = np.random.default_rng(0)
    group, category = np.repeat(np.arange(40), 25), rng.integers(0, 6, 1000)
    label = np.where(rng.random(1000) < 0.9, category % 3, rng.integers(0, 3, 1000))
    assert (category_predictions(category, label, group) == label).mean() > 0.85
    noise = rng.integers(0, 3, 1000)
    assert abs((category_predictions(category, noise, group) == noise).mean() - 1 / 3) < 0.07
    # negative control: a category that names the token itself would be right in its own training data
    assert (category_predictions(np.arange(1000), noise, group) == noise).mean() < 0.45
