"""The sinks study: the mass is that of the tokens, planted causes are found, and what is missing is named."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.studies import sinks
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


def test_sink_attention_is_that_of_the_tokens(demo):
    mass = sinks.mass(demo)
    data = demo.dataset[["sink", "channel", "sequence"]].compute()
    high = demo.sequences["effort"].eq("high").loc[data["sequence"].to_numpy()].to_numpy()
    chosen = high & (data["channel"].to_numpy() == 4)
    wanted = data["sink"].values.astype(np.float64)[:, chosen].mean(1)
    np.testing.assert_allclose(mass["mass"].sel(channel="final", effort="high"), wanted, rtol=1e-5)
    assert (mass["mass_low"] <= mass["mass"]).where(mass["mass"].notnull(), True).all()


def test_sink_attention_falls_with_position_where_that_was_planted():
    run = with_summaries(planted_tokens(position_slope=0.05, n_prompts=20))
    by_position = sinks.by_position(run)["mass"].sel(channel="analysis").isel(layer=0).dropna("bin")
    assert (np.diff(by_position.values) < 0).all()
    result = sinks.study(run)
    assert not result["analysis_vs_final"]["different"].sel(control="position").any()
    assert result["analysis_vs_final"]["different"].sel(control="none").any()


def test_sums_alone_give_the_mass_and_say_what_is_left_out(demo):
    class Sums:
        digest, sequences, model = demo.digest, demo.sequences, demo.model
        summary = staticmethod(demo.summary)

        @staticmethod
        def blocks(*names):
            raise InputError("the run recorded sums alone")

    result = sinks.study(Sums())
    assert set(result) == {"mass"}
    assert "Skipped" in result["mass"].attrs["summary"]
