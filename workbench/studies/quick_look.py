"""Shares and means of any selection, computed from stored sums at once and without intervals.

A finished run keeps its sums by channel, effort and task, so these cost milliseconds at ten million tokens. Numbers
with intervals, nulls and controls are those of the studies.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.errors import InputError
from workbench.studies.comparison import in_order
from workbench.studies.layer_experts import layer_experts, mask_absent
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.statistics import share

ALL = "all"

DEFINITIONS = {
    "load": Definition("load share", "1", "fraction of the selection's routed slots that went to this expert"),
    "gates": Definition("gate share", "1", "fraction of the selection's summed gate weights on this expert"),
    "lift": Definition("lift", "1", "load share in the selection over that in all content of the run (no frame)"),
    "mass": Definition("sink attention", "1", "mean probability on the sink over the selection's tokens"),
    "spread": Definition("standard deviation", "1", "of the probability on the sink over the selection's tokens"),
}
METHOD = "Sums over the tokens of the selection, pooled: long sequences weigh more. No interval is computed here."
NOT_CONTROLLED = "Selections differ in words, position, task and length; the studies have intervals and controls."


class Totals(Protocol):
    """What is needed of a run; `workbench.open_run` gives one."""

    @property
    def digest(self) -> str:
        """Return a digest of what is visible of the run."""

    def total(self, name: str) -> xr.DataArray:
        """Return sums by group (with `effort` and `task`) and channel."""


def options(run: Totals) -> dict[str, list[str]]:
    """Return channels, efforts and tasks that have a token, each with `all` first."""
    tokens = run.total("tokens")
    some = tokens.values.sum(1) > 0
    labels_of = {"channel": [str(c) for c in tokens["channel"].values[tokens.values.sum(0) > 0]]}
    for axis in ("effort", "task"):
        labels_of[axis] = in_order([str(v) for v in tokens[axis].values[some] if v])
    return {axis: [ALL, *labels] for axis, labels in labels_of.items()}


def tokens(run: Totals) -> pd.DataFrame:
    """Return tokens of every channel, one column for each effort and one for all."""
    total = run.total("tokens")
    efforts = in_order([str(e) for e in total["effort"].values])
    columns = {e: total.values[total["effort"].values.astype(str) == e].sum(0) for e in efforts}
    table = pd.DataFrame(columns | {ALL: total.values.sum(0)}, index=pd.Index(total["channel"].values, name="channel"))
    return table[table[ALL] > 0].rename(columns={"": "unstated"})


def routing(run: Totals, channel: str = ALL, effort: str = ALL, task: str = ALL) -> xr.Dataset:
    """Load, gates and lift [layer, expert] of a selection; NaN where it has no token."""
    counts, gates = run.total("expert_count"), run.total("gate_sum")
    load = share(_pooled(counts, channel, effort, task))
    everything = share(_pooled(counts, ALL, ALL, ALL))
    lift = np.divide(load, everything, out=np.full(load.shape, np.nan), where=everything > 0)
    values = {"load": load, "gates": share(_pooled(gates, channel, effort, task)), "lift": lift}
    labels = {"channel": channel, "effort": effort, "task": task}
    return mask_absent(_labelled(run, "routing", values, "expert", labels), run)


def sinks(run: Totals, channel: str = ALL, effort: str = ALL, task: str = ALL) -> xr.Dataset:
    """Return the mean and spread of sink attention [layer, head] of a selection; NaN where it has no token."""
    chosen = (channel, effort, task)
    first, second, n = (_pooled(run.total(name), *chosen) for name in ("sink_sum", "sink_sumsq", "tokens"))
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = first / n
        spread = np.sqrt(np.maximum(second / n - mass**2, 0))
    labels = {"channel": channel, "effort": effort, "task": task}
    return _labelled(run, "sinks", {"mass": mass, "spread": spread}, "head", labels)


def by_channel_and_effort(
    run: Totals, measure: Literal["load", "mass"], layer: int, column: int, task: str = ALL
) -> Float[pd.DataFrame, "channel effort"]:
    """Return one cell of `routing` (load relative to uniform) or `sinks` (sink attention) by channel and effort."""
    known = options(run)
    sums = run.total("sink_sum" if measure == "mass" else "expert_count").sel(layer=layer)
    if measure == "mass":
        over = run.total("tokens")
    else:
        over = sums.sum("expert") / layer_experts(run, layer + 1, sums.sizes["expert"])[layer]
    rows = {}
    for channel in known["channel"]:
        cells = [(_pooled(sums, channel, e, task)[column], _pooled(over, channel, e, task)) for e in known["effort"]]
        rows[channel] = [float(value / n) if n else np.nan for value, n in cells]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=known["effort"])
    return table.dropna(how="all").rename_axis("channel").reset_index()


def _pooled(total: xr.DataArray, channel: str, effort: str, task: str) -> np.ndarray:
    """Summed over the groups and channels of a selection; `all` channels are all but the frame."""
    chosen = np.ones(total.sizes["group"], dtype=bool)
    for axis, wanted in (("effort", effort), ("task", task)):
        if wanted != ALL:
            chosen &= total[axis].values.astype(str) == wanted
    known = [str(c) for c in total["channel"].values]
    if channel != ALL and channel not in known:
        raise InputError(f"channel {channel!r} is not in this run; it has {', '.join(known)}")
    columns = np.array([c == channel or (channel == ALL and c != "frame") for c in known], dtype=bool)
    # in numpy: a page has dozens of these, each of which took 2 ms with labels
    values = np.moveaxis(total.values, (total.get_axis_num("group"), total.get_axis_num("channel")), (0, 1))
    return np.nansum(values[np.ix_(chosen, columns)], (0, 1)).astype(np.float64)


def _labelled(
    run: Totals, study: str, values: Mapping[str, np.ndarray], column: str, chosen: Mapping[str, str]
) -> xr.Dataset:
    tokens = int(_pooled(run.total("tokens"), **chosen))
    name = ", ".join(v for v in (chosen["channel"], chosen["effort"], chosen["task"]) if v != ALL) or "all content"
    first = next(iter(values.values()))
    coords = {"layer": np.arange(first.shape[0]), column: np.arange(first.shape[1])}
    attrs = provenance(study, name, run.digest, 0, chosen)
    attrs |= {
        "tokens": tokens,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
        "summary": f"{name}: {tokens:,} tokens.",
    }
    return dataset({n: (("layer", column), v) for n, v in values.items()}, coords, DEFINITIONS, attrs)
