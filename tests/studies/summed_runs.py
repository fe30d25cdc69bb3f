"""Synthetic runs with sums by sequence and channel, as a store has them."""

import dataclasses

import numpy as np
import xarray as xr

from workbench.harmony.labels import CHANNELS
from workbench.studies.synthetic import SyntheticTokens


def with_summaries(run: SyntheticTokens) -> SyntheticTokens:
    """Return a synthetic run that also has the sums of a stored run: tokens, and sink attention with its squares."""
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
