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
    assert text.startswith("1 families of comparisons with 50 cells were tested; 10 cells are called different")
    assert "at most 0.5 are expected to be false" in text
    assert statement({}) == "No comparison was tested."


def test_a_difference_of_a_small_family_does_not_survive_among_many_others():
    weak = np.array([[0.04], [0.9]])
    others = np.random.default_rng(0).uniform(0.3, 1, (2, 500))
    text = statement({"one": {"weak": comparison(weak)}, "two": {"others": comparison(others)}})
    assert "1 cells are called different" in text
    assert "Over all families at once, 0 of them remain" in text, "the weak one is different in its own family alone"
    assert sum(1 for _ in families({"weak": comparison(weak), "others": comparison(others)})) == 4
