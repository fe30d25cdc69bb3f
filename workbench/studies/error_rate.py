"""How many comparisons results hold, and how many of their differences are expected to be false.

Within a family (the cells of one comparison and control) Benjamini–Hochberg bounds the expected share of false
differences by 5 %. A report has many families, so the same bound is also computed over all of them at once.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from workbench.studies.statistics import false_discovery

ALPHA = 0.05
# p, q and verdict of a family in a dataset
_FAMILIES = (
    ("p", "q", "different"),
    ("difference_p", "difference_q", "expert_different"),
    ("gain_p", "gain_q", "gain_different"),
    ("logprob_difference_p", "logprob_difference_q", "logprob_difference_different"),
    ("sink_difference_p", "sink_difference_q", "sink_difference_different"),
)


def families(datasets: Mapping[str, xr.Dataset]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield p [cell] and verdict [cell] of the tested cells of each family."""
    for ds in datasets.values():
        for p_name, q_name, verdict in _FAMILIES:
            if not {p_name, q_name, verdict} <= set(ds.data_vars):
                continue
            parts = [ds.sel(control=c) for c in ds["control"].values] if "control" in ds[p_name].dims else [ds]
            for part in parts:
                p, different = part[p_name].values.ravel(), part[verdict].values.ravel()
                tested = np.isfinite(p)
                if tested.any():
                    yield p[tested], different[tested].astype(bool)


def statement(results: Mapping[str, Mapping[str, xr.Dataset]]) -> str:
    """Return a sentence on the families, cells and expected false differences of several studies' results."""
    tested = [family for datasets in results.values() for family in families(datasets)]
    if not tested:
        return "No comparison was tested."
    p, different = (np.concatenate([family[i] for family in tested]) for i in (0, 1))
    remaining = int((different & (false_discovery(p) < ALPHA)).sum())
    called, expected = int(different.sum()), ALPHA * different.sum()
    return (
        f"{len(tested)} families of comparisons with {len(p):,} cells were tested; {called:,} cells are called "
        f"different, of which at most {expected:.1f} are expected to be false ({ALPHA:.0%} in each family, "
        f"Benjamini–Hochberg). Over all families at once, {remaining:,} of them remain. Without any difference, "
        f"{ALPHA * len(p):.0f} cells would have p < {ALPHA} by chance."
    )
