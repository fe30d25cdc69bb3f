"""The statement on error rates counts families, cells and differences, and controls them all at once."""

import numpy as np
import xarray as xr

from workbench.studies.error_rate import families, statement
from workbench.studies.statistics import false_discovery


def comparison(p: np.ndarray) -> xr.Dataset:
    q = np.stack([false_discovery(row) for row in p])
    dims = ("control", "head")
    variables = {"p": (dims, p), "q": (dims, q), "different": (dims, q < 0.05)}
    return xr.Dataset(variables, {"control": ["none", "position"]})


def test_families_cells_and_differences_are_counted():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 1, (2, 50))
    p[0, :10] = 1e-6
    p[1] = np.nan  # a control that cannot be tested is not a family
    text = statement({"sinks": {"a": comparison(p), "table": xr.Dataset({"p": ("term", [0.01])})}})
    assert text.startswith("1 family of tests with 50 cells ")
    assert "in 10 cells a difference or an effect is shown, of which 0.5 or fewer are expected to be false" in text
    assert statement({}) == "No comparison was tested."


def test_a_difference_of_a_small_family_does_not_survive_among_many_others():
    weak = np.array([[0.04], [0.9]])
    others = np.random.default_rng(0).uniform(0.3, 1, (2, 500))
    text = statement({"one": {"weak": comparison(weak)}, "two": {"others": comparison(others)}})
    assert "in 1 cells a difference" in text
    assert "Over all families at once, 0 of them remain" in text, "the weak one is different in its own family alone"
    assert sum(1 for _ in families({"weak": comparison(weak), "others": comparison(others)})) == 4


def test_a_comparison_that_two_studies_hold_counts_once():
    p = np.random.default_rng(0).uniform(0, 1, (2, 20))
    once, again = comparison(p), comparison(p + 1e-13)
    assert statement({"routing": {"a": once}, "channels": {"b": again}}) == statement({"routing": {"a": once}})
    other = comparison(p[:, ::-1])  # negative control: another comparison
    assert statement({"routing": {"a": once}, "channels": {"b": other}}).startswith("4 families of tests with 80 cells")


def test_effects_of_experiments_and_ranks_among_random_controls_count():
    """They have no verdict of their own: q, or the family-wise p, is below 0.05."""
    ablation = xr.Dataset({"p": ("intervention", [0.001, 0.5]), "q": ("intervention", [0.002, 0.5])})
    steering = xr.Dataset({"p": ("dose", [0.04, 0.01]), "p_family": ("dose", [0.09, 0.02])})
    model = xr.Dataset({"p": ("term", [0.001])})  # the terms of one regression are not a family
    text = statement({"ablation": {"a": ablation}, "steering": {"s": steering}, "effort": {"model": model}})
    assert text.startswith("2 families of tests with 4 cells ")
    assert "in 2 cells a difference or an effect is shown" in text
