"""The studies on planted runs and on the demo run: what is known comes back, what is not there is not told."""

import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.studies import channels, compare, effort, run_study, save, sinks
from workbench.studies.result import load as load_results
from workbench.studies.statistics import false_discovery
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


@pytest.fixture(scope="module")
def demo():
    return wb.open_run(DATA / "demo.zarr")


def with_summaries(run: SyntheticTokens):
    """A synthetic run that also has the sums a store keeps."""
    from workbench.harmony.labels import CHANNELS

    n = len(run.sequences)
    cell = run.tokens["sequence"] * len(CHANNELS) + run.tokens["channel"]
    tokens = np.bincount(cell, minlength=n * len(CHANNELS)).reshape(n, -1)
    coords = {c: ("sequence", run.sequences[c].to_numpy(dtype=object)) for c in ("id", "prompt_id", "effort", "task")}
    coords |= {"channel": list(CHANNELS), "sequence": np.arange(n)}
    tables = {"tokens": xr.DataArray(tokens, dims=("sequence", "channel"), coords=coords)}
    sink = run.tokens["sink"]
    for name, values in (("sink_sum", sink), ("sink_sumsq", sink**2)):
        sums = np.zeros((n * len(CHANNELS), *np.array(sink.shape)[[0, 2]]))
        np.add.at(sums, cell, values.swapaxes(0, 1))
        tables[name] = xr.DataArray(
            sums.reshape(n, len(CHANNELS), *sums.shape[1:]),
            dims=("sequence", "channel", "layer", "head"),
            coords=coords | {"layer": np.arange(sink.shape[0])},
        )

    @dataclasses.dataclass(frozen=True)
    class Both(SyntheticTokens):
        def summary(self, name: str) -> xr.DataArray:
            return tables[name]

    return Both(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)})


def test_every_study_runs_on_the_demo_and_explains_itself(demo, tmp_path):
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


def test_sink_mass_is_that_of_the_tokens(demo):
    mass = sinks.mass(demo)
    data = demo.dataset[["sink", "channel", "sequence"]].compute()
    high = demo.sequences["effort"].eq("high").loc[data["sequence"].to_numpy()].to_numpy()
    chosen = high & (data["channel"].to_numpy() == 4)
    wanted = data["sink"].values.astype(np.float64)[:, chosen].mean(1)
    np.testing.assert_allclose(mass["mass"].sel(channel="final", effort="high"), wanted, rtol=1e-5)
    assert (mass["mass_low"] <= mass["mass"]).where(mass["mass"].notnull(), True).all()


def test_sink_mass_falls_with_position_where_that_was_planted():
    run = with_summaries(planted_tokens(position_slope=0.05, n_prompts=20))
    by_position = sinks.by_position(run)["mass"].sel(channel="analysis").isel(layer=0).dropna("bin")
    assert (np.diff(by_position.values) < 0).all()
    found = sinks.study(run)
    assert not found["analysis_vs_final"]["different"].sel(control="position").any()
    assert found["analysis_vs_final"]["different"].sel(control="none").any()


def test_sums_alone_give_the_mass_and_say_what_is_left_out(demo):
    class Sums:
        digest, sequences, model = demo.digest, demo.sequences, demo.model
        summary = staticmethod(demo.summary)

        @staticmethod
        def blocks(*names):
            raise InputError("the run recorded sums alone")

    found = sinks.study(Sums())
    assert set(found) == {"mass"}
    assert "Left out" in found["mass"].attrs["summary"]


@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_the_gain_of_effort_is_in_its_interval(gain):
    inside = shown = 0
    for seed in range(100, 200):
        run = with_summaries(planted_tokens(seed=seed, n_prompts=60, n_layers=1, n_heads=1, gain=gain))
        table = effort.sequences_of(run)
        cell = effort.gain(run, table, ["low", "medium", "high"]).sel(task="all", step="low → high")
        inside += bool(cell["gain_low"] <= 2 * gain <= cell["gain_high"])
        shown += bool(cell["gain_low"] * cell["gain_high"] > 0)
    assert inside >= 93
    assert shown <= 12 if gain == 0 else shown >= 85


def test_the_effort_study_needs_two_efforts():
    with pytest.raises(InputError, match="compares at least 2"):
        effort.study(with_summaries(planted_tokens(efforts=("high",), n_prompts=5)))


def with_activations(run: SyntheticTokens, seed: int, shift: float, position: float = 0.0):
    """Recorded activations with a planted direction between channels, and one along position."""
    from types import SimpleNamespace

    rng = np.random.default_rng(seed)
    n, d = len(run.tokens["channel"]), 12
    direction = np.eye(d)[3]
    prompt = rng.normal(0, 1, (len(run.sequences), d))[run.tokens["sequence"]]
    x = rng.normal(size=(2, n, d)) + prompt
    x[1] += shift * (run.tokens["channel"] == 4)[:, None] * direction
    x[1] += position * run.tokens["position"][:, None] * np.eye(d)[5]
    spec = SimpleNamespace(activations=(SimpleNamespace(hook="hook_resid_post", layers=(0, 1), reduce="raw"),))

    @dataclasses.dataclass(frozen=True)
    class Recorded(SyntheticTokens):
        @property
        def spec(self):
            return spec

    tokens = dict(run.tokens) | {"hook_resid_post": x.astype(np.float32)}
    return Recorded(run.digest, run.sequences, run.model, tokens, run.truth)


def test_a_probe_finds_a_planted_direction_and_nothing_where_there_is_none():
    run = with_activations(planted_tokens(n_prompts=40), 0, shift=3.0)
    found = channels.geometry(run, "hook_resid_post", "analysis", "final")
    assert found["auc"][1] > 0.9
    assert abs(float(found["auc"][0]) - 0.5) < 0.08
    assert abs(float(found["selectivity"][0])) < 0.1
    assert found["distance"][1] > 3 * found["distance"][0]
    assert abs(float(found["cka"][0, 1]) - float(found["cka"][1, 0])) < 1e-9
    along = with_activations(planted_tokens(n_prompts=40), 0, shift=0.0, position=0.3)
    halves = channels.geometry(along, "hook_resid_post", "analysis", "final")
    assert halves["auc_half"][1] > 0.8, "position alone: the halves of analysis show it"


def test_debiased_cka_against_the_plain_formula_and_its_bias():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60, 300))

    def plain(a, b):
        k, m = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        n = len(k)
        one = np.ones(n)
        return (
            np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
        ) / (n * (n - 3))

    assert channels._hsic(x, y) == pytest.approx(plain(x, y))
    assert abs(channels.debiased_cka(x, y)) < 0.05
    assert channels.debiased_cka(x, 3 * x) == pytest.approx(1)
    centred = [v - v.mean(0) for v in (x, y)]
    biased = np.linalg.norm(centred[0].T @ centred[1]) ** 2 / np.prod([np.linalg.norm(v.T @ v) for v in centred])
    assert biased > 0.5, "what the debiasing is for"


def test_false_discovery_is_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(false_discovery(p), multipletests(p, method="fdr_bh")[1])


def altered(run: SyntheticTokens, share: float, seed: int = 0) -> SyntheticTokens:
    """The same tokens, a share of whose choices another router made at random."""
    rng = np.random.default_rng(seed)
    experts = run.tokens["experts"].copy()
    hit = rng.random(experts.shape) < share
    experts[hit] = rng.integers(0, run.model["num_experts"], int(hit.sum()))
    tokens = dict(run.tokens) | {"experts": experts}
    return SyntheticTokens("other", run.sequences, run.model, tokens, run.truth)


def complete(run: SyntheticTokens) -> SyntheticTokens:
    n = len(run.tokens["channel"])
    rng = np.random.default_rng(0)
    tokens = dict(run.tokens) | {"id": np.arange(n), "logprob": rng.normal(size=n)}
    return SyntheticTokens(run.digest, run.sequences, run.model, tokens, run.truth)


def test_planted_agreement_between_two_runs_is_in_its_interval():
    inside = 0
    for seed in range(100):
        run = complete(planted_tokens(seed=seed, n_layers=1, n_experts=8, n_heads=1, n_prompts=25))
        found = compare.study(run, altered(run, 0.4, seed))["agreement"].sel(channel="analysis").isel(layer=0)
        inside += bool(found["agreement_low"] <= 0.6 + 0.4 / 8 <= found["agreement_high"])
    assert inside >= 93
    same = compare.study(run, run)["agreement"]
    assert (same["agreement"].dropna("channel") == 1).all()
    assert not same["logprob_difference"].dropna("channel").any()


def test_unrelated_routers_agree_by_load_alone():
    run = complete(planted_tokens(n_layers=1, n_experts=8, n_heads=1, n_prompts=60))
    found = compare.study(run, altered(run, 1.0))["agreement"].sel(channel="analysis").isel(layer=0)
    assert abs(float(found["beyond_load"])) < 0.03
    assert float(found["agreement"]) > 0.1


def test_runs_of_other_sequences_are_not_compared():
    a, b = (complete(planted_tokens(seed=s, n_prompts=n)) for s, n in ((0, 5), (1, 6)))
    with pytest.raises(InputError, match="different sequences"):
        compare.study(a, b)
    with pytest.raises(InputError, match="takes 2 runs, 1 given"):
        run_study("compare", a)


def test_p_of_the_effort_contrasts_is_uniform_without_an_effect():
    from workbench.studies.contrast import contrast

    p = [
        float(
            contrast(planted_tokens(seed=s, n_layers=1, n_heads=1), "sink", "effort", "low", "high", channel="prompt")[
                "p"
            ]
            .sel(control="position")
            .squeeze()
        )
        for s in range(150)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_parameters_are_kept(demo):
    assert json.loads(sinks.mass(demo).attrs["parameters"]) == {"by": ["channel", "effort"]}
