"""The sinks study: the mass is that of the tokens, planted causes are found, and what is missing is named."""

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from tests.studies.summed_runs import with_summaries
from workbench.errors import InputError
from workbench.studies import sinks
from workbench.studies.synthetic import planted_tokens


@pytest.fixture(scope="module")
def demo():
    return wb.open_run(DATA / "demo.zarr")


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
