"""The effort study: planted gains are in their intervals, and nothing is found where nothing was planted."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from workbench.errors import InputError
from workbench.studies import effort
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


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
