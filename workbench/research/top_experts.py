"""The experts whose load grows most with a label: with a channel, an effort or a task."""

import numpy as np
import pandas as pd
import xarray as xr

from workbench.errors import InputError
from workbench.runs import Run
from workbench.studies.specialization import specialization

_AXES = ("channel", "effort", "task")


def top_experts(
    source: Run | xr.Dataset, n: int = 10, *, axis: str = "channel", label: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """Return the n (layer, expert) pairs with the largest lift for a label: mean load share with it over that with all.

    source: a run, or a dataset of `wb.studies.routing` about a label. axis: channel, effort or task. label: one of its
    values, all if None. p and q are of the layer, from labels shuffled within prompts (tasks: between them).

    Raises:
        InputError: the run has no routing, or fewer than two values of the label.
    """
    if axis not in _AXES:
        raise InputError(f"axis={axis!r}: use one of {', '.join(_AXES)}")
    data = specialization(source, axis, seed=seed) if isinstance(source, Run) else source
    if data is None or "label_lift" not in data:
        raise InputError(f"no lift for {axis!r}: a run needs routing and two values of {axis}, a dataset `label_lift`")
    lift = data["label_lift"]
    dim = next(str(d) for d in lift.dims if d not in ("layer", "expert"))
    if label is not None:
        if label not in lift[dim].values:
            raise InputError(f"{dim} {label!r}: the result has {', '.join(map(str, lift[dim].values))}")
        lift = lift.sel({dim: [label]})
    table = lift.to_dataframe("lift").reset_index()[[dim, "layer", "expert", "lift"]]
    table = table[np.isfinite(table["lift"])].nlargest(n, "lift").reset_index(drop=True)
    for name in ("p", "q"):
        if name in data:
            at = data[name].to_dataframe(name).reset_index()
            table = table.merge(at[[c for c in at.columns if c in (dim, "layer", name)]], how="left")
    return table
