"""All studies: each runs on the bundled run, describes itself, and is saved and loaded with its parameters."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.studies import run_study, save, sinks
from workbench.studies.result import load as load_results
from workbench.studies.statistics import false_discovery


@pytest.fixture(scope="module")
def demo():
    return wb.open_run(DATA / "demo.zarr")


def test_every_study_runs_on_the_demo_and_has_a_summary(demo, tmp_path):
    for name in ("routing", "sinks", "channels", "effort"):
        for dataset in run_study(name, demo).values():
            assert dataset.attrs["summary"]
            assert dataset.attrs["method"]
            assert dataset.attrs["run_digest"] == demo.digest
            for variable in dataset.data_vars.values():
                assert {"long_name", "units", "definition"} <= variable.attrs.keys()


def test_results_reload_from_their_files(demo, tmp_path):
    found = run_study("effort", demo)
    save(found, tmp_path)
    again = load_results(tmp_path)["effort"]
    assert again.keys() == found.keys()
    for name, dataset in found.items():
        for variable, values in dataset.data_vars.items():
            np.testing.assert_array_equal(np.asarray(again[name][variable].values, float), values.values.astype(float))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr: texts of a fixed length have no specification yet
            dataset.to_zarr(tmp_path / f"{name}.zarr", zarr_format=3, consolidated=False)
            stored = xr.open_zarr(tmp_path / f"{name}.zarr", consolidated=False).load()
        xr.testing.assert_equal(stored, dataset)
        assert stored.attrs == dataset.attrs
    table = pd.read_csv(tmp_path / "effort_cost_task_effort.csv")
    assert len(table) == found["cost"]["accuracy"].size
    with pytest.raises(InputError, match="holds no results"):
        load_results(tmp_path.parent)


def test_false_discovery_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(false_discovery(p), multipletests(p, method="fdr_bh")[1])


def test_parameters_are_kept(demo):
    assert json.loads(sinks.mass(demo).attrs["parameters"]) == {"by": ["channel", "effort"]}
