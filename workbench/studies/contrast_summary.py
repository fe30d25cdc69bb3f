"""The summary of a comparison: which cells differ with each control, and how large an undetected difference may be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from workbench.counting import count_of
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.run_index import duplicates_warning
from workbench.studies.wording import wording

_LABELS = {"none": "Within prompts", "position": "At equal position", "token": "At the same token ids"}
UNPAIRED = (
    "Unpaired: the prompts of the two sides are different, so that task, words, length, difficulty and position may "
    "cause the difference."
)


def describe(result: xr.Dataset) -> str:
    """Return the comparison in words, with and without controls; nothing whose interval includes zero differs."""
    lines = [] if result.attrs["paired"] else [UNPAIRED]
    if warning := duplicates_warning(int(result.attrs["duplicate_prompts"])):
        lines.append(warning)
    for control in map(str, result["control"].values):
        lines += _describe_control(result.sel(control=control), control, result.attrs)
    controls = [c for c in map(str, result["control"].values) if c != "none"]
    for control in controls if "none" in result["control"] else ():
        naive, matched = (result.sel(control=c) for c in ("none", control))
        if naive["different"].size > 1 and naive["different"].any() and np.isfinite(matched["p"]).any():
            same = np.sign(naive["difference"]) == np.sign(matched["difference"])
            remaining = int((naive["different"] & matched["different"] & same).sum())
            lines.append(
                f"Of {int(naive['different'].sum())} differences within prompts, {remaining} remain "
                f"{_LABELS[control][0].lower()}{_LABELS[control][1:]}."
            )
    return "\n".join(lines)


def _describe_control(cell: xr.Dataset, control: str, attrs: Mapping[str, Any]) -> list[str]:
    """Return the lines of one control."""
    paired = bool(attrs["paired"])
    label = _LABELS[control] if paired else "Between prompts"
    n = int(cell["prompts"])
    if not paired and control != "none":
        return [f"{_LABELS[control]}: not possible between different prompts."]
    if not np.isfinite(cell["p"].values).any():
        return [
            f"{label}: cannot be tested, as {count_of(n, 'prompt has', 'prompts have')} both sides and at least "
            f"{MIN_PROMPTS} are needed."
        ]
    counts = f"{count_of(n, 'prompt')}, {int(cell['tokens_a']):,} and {int(cell['tokens_b']):,} tokens"
    if left_out := int(cell["tokens_excluded"]):
        counts += (
            f"; excluded, as not paired: {count_of(int(cell['prompts_excluded']), 'prompt')}, "
            f"{count_of(int(cell['sequences_excluded']), 'sequence')}, {left_out:,} tokens"
        )
    different, tested = cell["different"].values, np.isfinite(cell["p"].values)  # experts that do not exist have no p
    others = tested & ~different
    largest = float(cell["bound"].values[others].max()) if others.any() else np.nan
    absent = f"a difference beyond {wording(attrs['what']).bound(largest)} is excluded (equivalence test, 5 %)"
    lines = []
    if not cell["difference"].dims:
        verdict = "differs" if different else f"no difference shown, {absent}"
        lines.append(f"{label} ({counts}): {verdict}; {_with_interval(cell, attrs)}.")
    else:
        lines.append(f"{label} ({counts}): {different.sum()} of {tested.sum()} cells differ.")
        ranked = np.argsort(-np.where(different, np.abs(cell["difference"].values), -np.inf), axis=None)
        for cell_index in ranked[: min(3, int(different.sum()))]:
            layer, column = np.unravel_index(cell_index, different.shape)
            kind = str(cell["difference"].dims[1])
            one = cell.isel({"layer": int(layer), kind: int(column)})
            lines.append(f"  layer {int(one['layer'])} {kind} {int(one[kind])}: {_with_interval(one, attrs)}")
        if others.any():
            n_others = int(others.sum())
            lines.append(
                f"  In {'the other cell' if n_others == 1 else f'each of the {n_others} other cells'}, {absent}."
            )
    return lines + ([f"  Warning: {warning}."] if (warning := few_prompts(n)) else [])


def _with_interval(cell: xr.Dataset, attrs: Mapping[str, Any]) -> str:
    words = wording(attrs["what"])
    sides = words.sides(float(cell["mean_a"]), float(cell["mean_b"]), attrs["a"], attrs["b"])
    return f"{sides}; difference {words.interval(*(float(cell[n]) for n in ('difference', 'low', 'high')))}"
