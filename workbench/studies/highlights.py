"""The largest verified differences of results as sentences: what a report, an overview or a published page opens with.

A difference is verified if its comparison is paired within prompts, calls it different, and calls it different with the
same sign at equal position, or cannot be tested there, which the sentence then states. Differences of several
quantities are ordered by their strength: the limit of the intervals that is nearest to zero, divided by the mean of the
quantity in the layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from workbench.counting import count_of, signed
from workbench.studies.wording import wording

Results = Mapping[str, Mapping[str, xr.Dataset]]

_NEEDED = {"mean_a", "mean_b", "difference", "low", "high", "different"}


@dataclass(frozen=True)
class Highlight:
    """One verified difference. difference, low, high: a − b within prompts, in the unit of the comparison's dataset.

    study, dataset: where it comes from. cell: its coordinates, such as {"layer": 2, "expert": 6}; empty for a quantity
    that a token has once. level: mean of the quantity in the layer. strength: what highlights are ordered by, no unit.
    """

    sentence: str
    study: str
    dataset: str
    cell: Mapping[str, int]
    difference: float
    low: float
    high: float
    level: float
    strength: float


def highlights(results: Results, most: int = 5) -> list[Highlight]:
    """Return the strongest verified difference of each comparison of each quantity, the strongest first.

    results: of studies and experiments, by study and dataset. A comparison that several studies hold appears once.
    """
    strongest: dict[tuple[str, str, str], Highlight] = {}
    for study, sets in results.items():
        for name, ds in sets.items():
            if not is_comparison(ds):
                continue
            key = (str(ds.attrs["what"]), str(ds.attrs["a"]), str(ds.attrs["b"]))
            highlight = _strongest(study, name, ds)
            if highlight is not None and key not in strongest:
                strongest[key] = highlight
    return sorted(strongest.values(), key=lambda h: -h.strength)[:most]


def accuracy_sentences(results: Results) -> list[str]:
    """Return the gain of accuracy from the lowest to the highest effort as a sentence; empty if nothing was graded."""
    sentences = []
    for ds in (sets["gain"] for sets in results.values() if {"gain", "cost"} <= set(sets)):
        step = ds.sel(task="all").isel(step=-1)
        first, last = str(step["step"].item()).split(" → ")
        gain, low, high, tokens = (float(step[n]) for n in ("gain", "gain_low", "gain_high", "more_tokens"))
        spent = f"with {abs(tokens):,.1f} {'more' if tokens >= 0 else 'fewer'} analysis tokens per answer"
        if not np.isfinite(low * high):
            continue
        if low * high > 0:
            verb = "rises" if gain > 0 else "falls"
            sentences.append(
                f"Accuracy {verb} from {first} to {last} effort by {100 * abs(gain):.1f} points "
                f"[{_interval(100, low, high)}], {spent}."
            )
        else:
            sentences.append(
                f"No change of accuracy is shown from {first} to {last} effort: {signed(100 * gain, 1)} points "
                f"[{_interval(100, low, high)}], {spent}."
            )
    return sentences


def untested(results: Results) -> list[str]:
    """Return the comparisons that could not be tested: those that studies skipped, and those with too few prompts."""
    lines = []
    for sets in results.values():
        for ds in sets.values():
            summary = str(ds.attrs.get("summary", "")).splitlines()
            lines += [line.removeprefix("Skipped: ").strip() for line in summary if line.startswith("Skipped")]
            lines += [f"{ds.attrs['title']}, {control}." for control in _untested_controls(ds)]
    return list(dict.fromkeys(lines))


def _untested_controls(ds: xr.Dataset) -> Iterator[str]:
    if not is_comparison(ds):
        return
    for control in map(str, ds["control"].values):
        one = ds.sel(control=control)
        if not np.isfinite(one["low"].values).any():
            label = "within prompts" if control == "none" else f"at equal {control}"
            yield (
                f"{label}: {count_of(int(one['prompts']), 'prompt has', 'prompts have')} both sides, which are too few"
            )


def is_comparison(ds: xr.Dataset) -> bool:
    """Return whether a dataset is a comparison of two sides under controls, as `contrast` returns."""
    return set(ds.data_vars) >= _NEEDED and "control" in ds.dims and {"what", "a", "b"} <= ds.attrs.keys()


def _strongest(study: str, name: str, ds: xr.Dataset) -> Highlight | None:
    """Return the strongest verified difference of a comparison, None if it has none."""
    if not int(ds.attrs.get("paired", 0)) or "none" not in ds["control"].values:
        return None
    plain = ds.sel(control="none")
    verified, nearest = plain["different"].values.astype(bool), _nearest(plain)
    matched = ds.sel(control="position") if "position" in ds["control"].values else None
    if matched is not None:
        tested = np.isfinite(matched["low"].values)
        same = np.sign(matched["difference"].values) == np.sign(plain["difference"].values)
        verified &= ~tested | (matched["different"].values.astype(bool) & same)
        nearest = np.where(tested, np.fmin(nearest, _nearest(matched)), nearest)
    level = _level(plain)
    strength = np.where(verified & (level > 0), nearest / np.where(level > 0, level, 1), -np.inf)
    if not np.isfinite(strength).any():
        return None
    at = np.unravel_index(int(np.argmax(strength)), strength.shape)
    where = dict(zip(map(str, plain["difference"].dims), map(int, at), strict=True))
    cell = {axis: int(plain[axis].values[i]) for axis, i in where.items()}
    one = plain.isel(where)
    difference, low, high = (float(one[n]) for n in ("difference", "low", "high"))
    sentence = _sentence(ds, cell, one, None if matched is None else matched.isel(where))
    return Highlight(sentence, study, name, cell, difference, low, high, float(level[at]), float(strength[at]))


def _nearest(cells: xr.Dataset) -> np.ndarray:
    """Return the distance from zero of the nearer limit of each interval."""
    return np.minimum(np.abs(cells["low"].values), np.abs(cells["high"].values))


def _level(cells: xr.Dataset) -> np.ndarray:
    """Return the mean of the quantity over the cells of each layer and both sides, in the shape of the cells."""
    level = (np.abs(cells["mean_a"].values) + np.abs(cells["mean_b"].values)) / 2
    return np.broadcast_to(level.mean(-1, keepdims=True), level.shape) if level.ndim > 1 else level


def _sentence(ds: xr.Dataset, cell: Mapping[str, int], one: xr.Dataset, matched: xr.Dataset | None) -> str:
    words = wording(ds.attrs["what"])
    levels = words.sides(float(one["mean_a"]), float(one["mean_b"]), ds.attrs["a"], ds.attrs["b"])
    where = ", ".join(f"{axis} {number}" for axis, number in cell.items())
    text = f"{where}: {levels}" if where else levels
    text += f"; difference {_effect(ds, one)} within {count_of(int(one['prompts']), 'prompt')}"
    if matched is None:
        control = ""
    elif np.isfinite(float(matched["low"])):
        control = f", {_effect(ds, matched)} at equal position"
    else:
        control = "; not tested at equal position"
    return f"{text[:1].upper()}{text[1:]}{control}."


def _effect(ds: xr.Dataset, one: xr.Dataset) -> str:
    return wording(ds.attrs["what"]).interval(*(float(one[n]) for n in ("difference", "low", "high")))


def _interval(factor: float, low: float, high: float) -> str:
    return f"{signed(factor * low, 1)}, {signed(factor * high, 1)}"
