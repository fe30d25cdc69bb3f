"""All studies: each runs on the bundled run, describes itself, and is saved and loaded with its parameters."""

import contextlib
import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench import registry
from workbench.errors import InputError
from workbench.studies import quick_look, run_index, run_study, save, sinks
from workbench.studies.result import load as load_results
from workbench.studies.statistics import false_discovery


@pytest.fixture(scope="module")
def demo():
    return wb.open_run(DATA / "demo.zarr")


def one_run(run: wb.Run, **options: int) -> dict[str, dict[str, xr.Dataset]]:
    """Results of every registered study that needs nothing but this run; of two runs, the run with itself."""
    results = {}
    for record in registry.studies():
        own = {name: value for name, value in options.items() if name in record.options}
        with contextlib.suppress(InputError):  # it lacks a record
            results[record.name] = run_study(record.name, *[run] * record.runs, **own)
    return results


@pytest.fixture(scope="module")
def results(demo):
    """Results of all studies of the bundled run, which no test changes."""
    return one_run(demo)


def test_every_study_runs_on_the_demo_and_has_a_summary(demo, results):
    assert {"routing", "sinks", "channels", "effort"} <= results.keys()
    for datasets in results.values():
        for dataset in datasets.values():
            assert dataset.attrs["summary"]
            assert dataset.attrs["method"]
            assert dataset.attrs["run_digest"] == demo.digest
            for variable in dataset.data_vars.values():
                assert {"long_name", "units", "definition"} <= variable.attrs.keys()


def test_results_reload_from_their_files(results, tmp_path):
    result = results["effort"]
    save(result, tmp_path)
    again = load_results(tmp_path)["effort"]
    assert again.keys() == result.keys()
    for name, dataset in result.items():
        for variable, values in dataset.data_vars.items():
            np.testing.assert_array_equal(np.asarray(again[name][variable].values, float), values.values.astype(float))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr: texts of a fixed length have no specification yet
            dataset.to_zarr(tmp_path / f"{name}.zarr", zarr_format=3, consolidated=False)
            stored = xr.open_zarr(tmp_path / f"{name}.zarr", consolidated=False).load()
        xr.testing.assert_equal(stored, dataset)
        assert stored.attrs == dataset.attrs
    table = pd.read_csv(tmp_path / "effort_cost_task_effort.csv")
    assert len(table) == result["cost"]["accuracy"].size
    with pytest.raises(InputError, match="holds no results"):
        load_results(tmp_path.parent)


def test_false_discovery_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(false_discovery(p), multipletests(p, method="fdr_bh")[1])


def test_parameters_are_kept(demo):
    assert json.loads(sinks.mass(demo).attrs["parameters"]) == {"by": ["channel", "effort"]}


Answers = dict[tuple[str, ...], list[tuple[str, dict[str, np.ndarray]]]]


def answers_by_question(results: dict[str, dict[str, xr.Dataset]]) -> Answers:
    """What studies say about the same question: a difference of two sides under a control, or routers' agreement."""
    answers: Answers = {}
    for study, sets in results.items():
        for name, ds in sets.items():
            for question, values in _answers(ds):
                answers.setdefault(question, []).append((f"{study}/{name}", values))
    return answers


def _answers(ds: xr.Dataset):
    if {"what", "paired"} <= ds.attrs.keys():
        names = ("difference", "low", "high", "p", "q", "different")
        for control in map(str, ds["control"].values):
            one = ds.sel(control=control)
            question = (ds.attrs["what"], ds.attrs["a"], ds.attrs["b"], control)
            yield question, {name: one[name].values for name in names}
    if "expert_different" in ds:
        sides = [ds.attrs[side] for side in "ab"]
        if ds.attrs["between"] == "effort":
            sides = [f"{ds.attrs['within']} at {side} effort" for side in sides]
        values = {name: ds[f"difference_{name}"].values for name in ("low", "high", "p", "q")}
        values |= {"difference": ds["difference"].values, "different": ds["expert_different"].values}
        yield ("experts", *sides, "none"), values
    if {"rate_a", "control"} <= ds.variables.keys():  # a fraction of tokens, of which each has k slots
        one, k = ds.sel(control="prompt"), ds.attrs["experts_per_token"]
        values = {n: one[n].values for n in ("p", "q", "different")} | {"difference": -one["difference"].values / k}
        values |= {"low": -one["high"].values / k, "high": -one["low"].values / k}
        yield ("experts", *(ds.attrs[side].removeprefix("channel=") for side in "ba"), "none"), values
    if {"agreement", "agreement_low"} <= set(ds.data_vars):
        by = ("by effort",) if "effort" in ds["agreement"].dims else ()
        yield ("agreement", *by), {name: ds[name].values for name in ("agreement", "agreement_low", "agreement_high")}


def disagreements(results: dict[str, dict[str, xr.Dataset]]) -> list[str]:
    lines = []
    for question, answers in answers_by_question(results).items():
        (first, values), *others = answers
        for other, theirs in others:
            for name in sorted(values.keys() | theirs.keys()):
                if not np.allclose(values[name].astype(float), theirs[name].astype(float), atol=1e-9, equal_nan=True):
                    lines.append(f"{' '.join(question)}: {name} of {first} and {other}")
    return lines


def test_every_question_has_one_answer_in_all_registered_studies(demo, results):
    several = {"routing", "channels", "sinks", "effort", "compare", "routing-agreement-runs", "risk-difference"}
    assert several <= results.keys()
    of_experts = answers_by_question(results)["experts", "analysis", "final", "none"]
    assert len({study.split("/")[0] for study, _ in of_experts}) == 3
    several = {question for question, answers in answers_by_question(results).items() if len(answers) > 1}
    assert {
        ("experts", "analysis", "final", "none"),
        ("experts", "prompt at low effort", "prompt at high effort", "none"),
        ("experts", "analysis at medium effort", "analysis at high effort", "none"),
        ("experts", "final at low effort", "final at high effort", "none"),
        ("sink", "analysis", "final", "none"),
        ("sink", "analysis", "final", "position"),
        ("sink", "the first half of analysis", "the second half of analysis", "none"),
        ("sink", "prompt at low effort", "prompt at high effort", "position"),
        ("agreement",),
    } <= several
    assert disagreements(results) == []
    # negative control: the difference of all tokens of either side, which one study had instead
    sides = [quick_look.routing(demo, channel=channel)["load"].values for channel in ("analysis", "final")]
    pooled = results["channels"]["routing_analysis_vs_final"].copy(deep=True)
    pooled["difference"].loc[{"control": "none"}] = sides[0] - sides[1]
    broken = results | {"channels": results["channels"] | {"routing_analysis_vs_final": pooled}}
    assert any("experts analysis final none: difference" in text for text in disagreements(broken))
    assert results["routing"]["analysis_vs_final"]["difference"][1, 8] > 0 > pooled["difference"][0, 1, 8]


def test_the_same_difference_has_the_same_unit_in_every_summary(results):
    texts = {"channels": "routing_analysis_vs_final", "routing": "analysis_vs_final"}
    lines = {
        study: [x for x in results[study][name].attrs["summary"].splitlines() if "layer 0 expert 15" in x]
        for study, name in texts.items()
    }
    assert lines["channels"][0] == lines["routing"][0]
    assert lines["channels"][0].endswith("points")


def test_duplicated_prompts_count_once_in_every_study(results, monkeypatch):
    """A run whose every prompt has a copy under another id has the intervals of a run of half as many prompts."""
    run = wb.open_run(DATA / "demo.zarr")
    number = run_index.index_of(run).prompts[0]
    index = run_index.RunIndex(run)
    index.__dict__["prompts"] = (number // 2, int(number.max() + 1) // 2)
    monkeypatch.setattr(run_index, "index_of", lambda run: index)
    monkeypatch.setattr("workbench.studies.contrast.index_of", lambda run: index)
    merged = {name: run_study(name, run) for name in ("sinks", "effort")} | {"compare": run_study("compare", run, run)}
    for study, sets in merged.items():
        for name, ds in sets.items():
            assert "repeat the tokens of others" in ds.attrs["summary"], (study, name)
            assert "repeat" not in results[study][name].attrs["summary"]
    for study, name, variable in (
        ("sinks", "mass", "mass"),
        ("sinks", "position", "mass"),
        ("effort", "cost", "accuracy"),
        ("effort", "gain", "gain"),
    ):
        widths = [
            sets[study][name][f"{variable}_high"] - sets[study][name][f"{variable}_low"] for sets in (results, merged)
        ]
        assert not np.allclose(widths[0], widths[1], equal_nan=True), (study, name)


@pytest.fixture
def of_prompts(monkeypatch):
    """Return a function that opens the bundled run as if it had n independent prompts."""

    def merged(n: int) -> wb.Run:
        run = wb.open_run(DATA / "demo.zarr")
        index = run_index.RunIndex(run)
        index.__dict__["prompts"] = (run_index.index_of(run).prompts[0] % n, 1)
        monkeypatch.setattr(run_index, "index_of", lambda run: index)
        for module in ("contrast", "risk_difference", "router_prediction", "sink_difference"):
            monkeypatch.setattr(f"workbench.studies.{module}.index_of", lambda run: index)
        return run

    return merged


def test_fewer_than_twenty_prompts_are_named_in_every_study(results, of_prompts):
    assert "Warning" not in results["sinks"]["mass"].attrs["summary"]
    of_few = one_run(of_prompts(12), n_boot=20, n_permutations=99)
    assert {"routing", "expert-examples", "router-prediction", "routing-agreement-runs"} <= of_few.keys()
    for study, sets in of_few.items():
        for name, ds in sets.items():
            assert re.search(r"only (\d|1\d) prompts: intervals of fewer than 20", ds.attrs["summary"]), (study, name)


def test_fewer_than_five_prompts_have_no_interval_in_any_study(of_prompts):
    for study, sets in one_run(of_prompts(4), n_boot=20, n_permutations=99).items():
        for name, ds in sets.items():
            limits = [v for v in map(str, ds.data_vars) if v.endswith(("low", "high")) and not v.startswith("null")]
            for variable in limits:
                assert np.isnan(ds[variable]).all(), (study, name, variable)
            for variable in {"p", "q"} & set(ds.data_vars):
                assert np.isnan(ds[variable]).all(), (study, name, variable)
            assert "only 4 prompts" in ds.attrs["summary"] or "cannot be tested" in ds.attrs["summary"], (study, name)
