"""How many tests results hold, and how many of the differences and effects they show are expected to be false.

A family is the cells that one q is computed over: of one comparison and control, or of the interventions of one
experiment. Within it Benjamini–Hochberg (or, for random controls in several doses, the family-wise p) bounds the
expected share of false differences by 5 %. A report has many families, so the same bound is also computed over all of
them at once. A comparison that several studies hold counts once.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from workbench.studies.statistics import ALPHA, false_discovery

_VERDICTS = {"": "different", "difference": "expert_different"}  # of q and difference_q; of another q, NAME_different


def families(datasets: Mapping[str, xr.Dataset]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield p [cell] and verdict [cell] of the tested cells of each family; without a verdict of its own, q < 0.05."""
    for ds in datasets.values():
        for p_name, q_name, verdict in _named_families(ds):
            parts = [ds.sel(control=c) for c in ds["control"].values] if "control" in ds[p_name].dims else [ds]
            for part in parts:
                p, q = part[p_name].values.ravel(), part[q_name].values.ravel()
                shown = part[verdict].values.ravel().astype(bool) if verdict in part else q < ALPHA
                tested = np.isfinite(p)
                if tested.any():
                    yield p[tested], shown[tested]


def _named_families(ds: xr.Dataset) -> Iterator[tuple[str, str, str]]:
    """Yield the names of p, q and verdict of each family of a dataset."""
    names = [str(name) for name in ds.data_vars]
    for q_name in names:
        stem = q_name[:-1].rstrip("_") if q_name == "q" or q_name.endswith("_q") else None
        p_name = f"{stem}_p" if stem else "p"
        if stem is not None and p_name in names and ds[p_name].dims == ds[q_name].dims:
            yield p_name, q_name, _VERDICTS.get(stem, f"{stem}_different")
    if "p_family" in names:  # ranks among random controls
        yield ("p_rank" if "p_rank" in names else "p_family"), "p_family", ""


def statement(results: Mapping[str, Mapping[str, xr.Dataset]]) -> str:
    """Return sentences on the families, cells and expected false differences of several studies' results."""
    tested = _without_repeats(family for datasets in results.values() for family in families(datasets))
    if not tested:
        return "No comparison was tested."
    p, different = (np.concatenate([family[i] for family in tested]) for i in (0, 1))
    remaining = int((different & (false_discovery(p) < ALPHA)).sum())
    called, expected = int(different.sum()), ALPHA * different.sum()
    return (
        f"{len(tested)} famil{'y' if len(tested) == 1 else 'ies'} of tests with {len(p):,} cells (a comparison that "
        f"several studies hold counts once); in {called:,} cells a difference or an effect is shown, of which "
        f"{expected:.1f} or fewer are expected to be false (5 % in each family). Over all families at once, "
        f"{remaining:,} of them remain (Benjamini–Hochberg). Without any difference, {ALPHA * len(p):.0f} cells would "
        f"have p < {ALPHA} by chance."
    )


def _without_repeats(families: Iterator[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the families, those with the same p in the same order once."""
    distinct: dict[object, tuple[np.ndarray, np.ndarray]] = {}
    for family in families:
        rounded = np.round(family[0], 9)
        key = rounded.tobytes() if np.ptp(rounded) > 0 else len(distinct)  # equal constants may be other tests
        distinct.setdefault(key, family)
    return list(distinct.values())
