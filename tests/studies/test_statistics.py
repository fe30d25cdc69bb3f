"""Measures of a distribution: against scipy, against their algebra, and against published counts of gpt-oss-20b."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from workbench.studies import statistics

DATA = Path(__file__).parents[1] / "data"

# normalised entropy, effective experts, Gini, MaxVio, CV (means over layers), experts never selected
PUBLISHED = {
    ("f20", 1): (0.771, 14.9, 0.645, 4.77, 1.40, 45),
    ("f20", 2): (0.765, 14.6, 0.653, 4.92, 1.43, 52),
    ("s20", 1): (0.721, 12.8, 0.692, 4.87, 1.53, 112),
    ("s20", 2): (0.798, 16.3, 0.612, 4.26, 1.28, 2),
}
F20_ENTROPY = (
    ".92 .90 .82 .83 .83 .81 .88 .83 .82 .73 .71 .71 .76 .72 .74 .79 .73 .72 .76 .76 .69 .68 .72 .65"  # with document
)

counts = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 9)), elements=st.integers(0, 50)).filter(
    lambda array: bool((array.sum(axis=-1) > 0).all())
)


def published_counts(name: str, condition: int) -> np.ndarray:
    table = pd.read_csv(DATA / f"routing_counts_{name}.csv")
    return table.pivot(index="layer", columns="expert", values=f"selected_{condition}").to_numpy()


@pytest.mark.parametrize(("name", "condition"), PUBLISHED)
def test_balance_of_gpt_oss_20b_is_reproduced_to_the_published_digits(name, condition):
    load = statistics.share(published_counts(name, condition))
    digits = (
        round((statistics.entropy(load) / np.log(32)).mean(), 3),
        round(statistics.effective_number(load).mean(), 1),
        round(statistics.gini(load).mean(), 3),
        round(statistics.max_violation(load).mean(), 2),
        round(statistics.coefficient_of_variation(load).mean(), 2),
        int((load == 0).sum()),
    )
    assert digits == PUBLISHED[name, condition]


def test_entropy_of_gpt_oss_20b_by_layer_is_reproduced():
    load = statistics.share(published_counts("f20", 1))
    by_layer = np.round(statistics.entropy(load) / np.log(32), 2)
    np.testing.assert_array_equal(by_layer, [float(value) for value in F20_ENTROPY.split()])


@pytest.mark.parametrize(("name", "mean", "peak", "layer"), [("f20", 0.016, 0.057, 15), ("s20", 0.124, 0.198, 10)])
def test_divergence_between_published_conditions_is_reproduced(name, mean, peak, layer):
    jsd = statistics.jensen_shannon(*(statistics.share(published_counts(name, condition)) for condition in (1, 2)))
    assert (round(jsd.mean(), 3), round(jsd.max(), 3), int(jsd.argmax())) == (mean, peak, layer)


@given(counts)
def test_entropy_and_divergence_agree_with_scipy(array):
    p = statistics.share(array)
    np.testing.assert_allclose(statistics.entropy(p), scipy.stats.entropy(p, axis=-1), atol=1e-12)
    q = np.roll(p, 1, axis=-1)
    distance = scipy.spatial.distance.jensenshannon(p, q, base=2, axis=-1)
    np.testing.assert_allclose(statistics.jensen_shannon(p, q), distance**2, atol=1e-12)


def test_divergence_in_nats_would_be_noticed():
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert statistics.jensen_shannon(p, q) == pytest.approx(1.0)
    in_nats = statistics.entropy((p + q) / 2)
    assert in_nats != pytest.approx(1.0)


@given(counts)
def test_measures_ignore_the_numbering_of_experts_and_the_number_of_tokens(array):
    p, other = statistics.share(array), statistics.share(array[..., ::-1] * 7)
    for measure in (
        statistics.entropy,
        statistics.effective_number,
        statistics.gini,
        statistics.max_violation,
        statistics.coefficient_of_variation,
    ):
        np.testing.assert_allclose(measure(p), measure(other), atol=1e-12)


@given(counts)
def test_measures_stay_within_their_bounds(array):
    p = statistics.share(array)
    n = p.shape[-1]
    for value, low, high in (
        (statistics.effective_number(p), 1, n),
        (statistics.gini(p), 0, 1 - 1 / n),
        (statistics.max_violation(p), 0, n - 1),
        (statistics.jensen_shannon(p, p[..., ::-1]), 0, 1),
    ):
        assert (value >= low - 1e-12).all()
        assert (value <= high + 1e-12).all()


@pytest.mark.parametrize("n", [2, 5, 32])
def test_even_and_concentrated_loads_have_the_textbook_values(n):
    even, one = np.full(n, 1 / n), np.eye(n)[0]
    assert statistics.effective_number(even) == pytest.approx(n)
    assert statistics.effective_number(one) == pytest.approx(1)
    assert statistics.gini(even) == pytest.approx(0)
    assert statistics.gini(one) == pytest.approx(1 - 1 / n)
    assert statistics.max_violation(one) == pytest.approx(n - 1)
    assert statistics.coefficient_of_variation(one) == pytest.approx(np.sqrt(n - 1))


def test_nothing_counted_is_missing_rather_than_even():
    p = statistics.share(np.array([[0, 0, 0], [1, 1, 2]]))
    assert np.isnan(p[0]).all()
    for measure in (statistics.entropy, statistics.gini, statistics.max_violation, statistics.effective_number):
        missing, present = measure(p)
        assert np.isnan(missing)
        assert np.isfinite(present)


def test_false_discovery_leaves_out_what_was_not_tested():
    p = np.array([[0.001, np.nan], [0.02, 0.8]])
    q = statistics.false_discovery(p)
    assert np.isnan(q[0, 1])
    np.testing.assert_allclose(q[~np.isnan(p)], scipy.stats.false_discovery_control([0.001, 0.02, 0.8]))
    assert np.isnan(statistics.false_discovery(np.full(3, np.nan))).all()
