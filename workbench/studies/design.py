"""Which sequences and tokens a number rests on: cells of a run, and pairs or groups to compare.

A *cell* is the tokens of some channels in the sequences of one effort or task. A *comparison* sets two conditions side
by side, with as much held equal as the run allows: two channels of the same sequence, two efforts of the same prompt
(and the same channel), or, where nothing can be paired, the prompts of two tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
from jaxtyping import Int

from workbench.errors import InputError

EFFORTS = ("low", "medium", "high")
# sequences that state no effort (or no task) are still data
UNSTATED = "unstated"

Between = Literal["channel", "effort", "task"]
Condition = tuple[str, str | None, str | None]


class Run(Protocol):
    """What a study needs of a run; `workbench.open_run` gives one."""

    @property
    def digest(self) -> str:
        """Names what is visible of the run."""

    def summary(self, name: str) -> xr.DataArray:
        """Sums per sequence and channel, with coordinates `channel`, `id`, `effort`, `prompt_id` and `task`."""


@dataclass(frozen=True)
class Cell:
    """Channels pooled over their tokens, and the sequences (places in the run) whose tokens they are."""

    labels: Mapping[str, str]
    channels: tuple[str, ...]
    sequences: Int[np.ndarray, "sequence"]


@dataclass(frozen=True)
class Comparison:
    """Counts of two conditions per unit; when `paired`, row i of either is the same unit."""

    a: Int[np.ndarray, "unit_a layer expert"]
    b: Int[np.ndarray, "unit_b layer expert"]
    tokens: tuple[int, int]
    paired: bool
    unit: str
    description: str


def labels(summary: xr.DataArray, name: str) -> np.ndarray:
    """The effort, task or prompt of every sequence, as text; what is not stated says so."""
    values = summary.coords[name].values if name in summary.coords else np.full(summary.sizes["sequence"], "")
    return np.array([str(value) or UNSTATED for value in values], dtype=object)


def in_order(values: Sequence[str]) -> list[str]:
    """Distinct labels: efforts by how hard the model thinks, everything else by the alphabet."""
    return sorted(set(values), key=lambda value: (EFFORTS.index(value) if value in EFFORTS else len(EFFORTS), value))


def known_channels(summary: xr.DataArray, channels: Sequence[str] | None = None) -> list[str]:
    """The channels asked for (all by default), each of which the run must have."""
    known = [str(name) for name in summary.coords["channel"].values]
    for channel in channels or ():
        if channel not in known:
            raise InputError(f"channel {channel!r} is not in this run; it has {', '.join(known)}")
    return list(channels or known)


def axes(summary: xr.DataArray, by: Sequence[str], channels: Sequence[str] | None) -> dict[str, list[str]]:
    """The labels along each axis that splits a run into cells."""
    wrong = [axis for axis in by if axis not in ("channel", "effort", "task")]
    if wrong or len(set(by)) != len(by):
        raise InputError(f"by={tuple(by)!r} is not possible; each of channel, effort and task may be named once")
    chosen = known_channels(summary, channels)
    return {axis: chosen if axis == "channel" else in_order(list(labels(summary, axis))) for axis in by}


def cells(tokens: xr.DataArray, by: Sequence[str], channels: Sequence[str] | None = None) -> Iterator[Cell]:
    """Every cell of a run, those without a single token included; sequences without a token in a cell are left out."""
    split = axes(tokens, by, channels)
    for place in product(*split.values()):
        named = dict(zip(split, place, strict=True))
        within = (named["channel"],) if "channel" in named else tuple(known_channels(tokens, channels))
        chosen = tokens.sel(channel=list(within)).sum("channel").values > 0
        for axis in set(named) - {"channel"}:
            chosen &= labels(tokens, axis) == named[axis]
        yield Cell(named, within, np.flatnonzero(chosen))


def condition(between: Between, value: str, channel: str | None, effort: str | None, task: str | None) -> Condition:
    """Channel, effort and task of one side of a comparison; None does not restrict."""
    fixed = {"channel": channel, "effort": effort, "task": task}
    if between not in fixed:
        raise InputError(f"between={between!r} is not possible; choose channel, effort or task")
    if fixed[between] is not None:
        raise InputError(f"{between}={fixed[between]!r} cannot be fixed in a comparison between {between}s; leave it out")
    if between != "channel" and channel is None:
        raise InputError(f"a comparison between {between}s needs the channel to look at, such as channel='analysis'")
    fixed[between] = value
    return fixed["channel"], fixed["effort"], fixed["task"]


def has_tokens(tokens: xr.DataArray, side: Condition) -> np.ndarray:
    """Whether each sequence has tokens on this side of a comparison."""
    channel, effort, task = side
    known_channels(tokens, [channel] if channel else None)
    found = np.asarray(tokens.sel(channel=channel).values > 0)
    for name, wanted in (("effort", effort), ("task", task)):
        if wanted is not None:
            known = in_order(list(labels(tokens, name)))
            if wanted not in known:
                raise InputError(f"{name} {wanted!r} is not in this run; it has {', '.join(known)}")
            found &= labels(tokens, name) == wanted
    return found


def units(tokens: xr.DataArray, between: Between, sides: tuple[Condition, Condition]) -> tuple[np.ndarray, np.ndarray]:
    """Unit of every sequence on either side (−1: not on that side); units found on both sides have the same number.

    The unit is the sequence between channels, and the prompt otherwise: a prompt's samples are not independent.
    """
    if between == "channel":
        _, unit = np.unique(np.arange(tokens.sizes["sequence"]), return_inverse=True)
    else:
        _, unit = np.unique(labels(tokens, "prompt_id").astype(str), return_inverse=True)
    first, second = (np.where(has_tokens(tokens, side), unit, -1) for side in sides)
    if between != "task":
        shared = np.intersect1d(first, second)
        first, second = (np.where(np.isin(side, shared), side, -1) for side in (first, second))
    return first, second


def compare(
    counts: xr.DataArray, tokens: xr.DataArray, between: Between, sides: tuple[Condition, Condition]
) -> Comparison:
    """The counts of both sides, summed within a unit."""
    names = [" ".join(part for part in side if part) for side in sides]
    members = units(tokens, between, sides)
    n_units = [len(np.unique(member[member >= 0])) for member in members]
    unit = "sequence" if between == "channel" else "prompt"
    if min(n_units) < 2:
        found = f"{n_units[0]} and {n_units[1]} {unit}s" if between == "task" else f"{n_units[0]} {unit}s on both sides"
        raise InputError(f"{names[0]} cannot be compared with {names[1]}: {found}, and at least 2 are needed")
    summed = [_sum_by(counts.sel(channel=side[0]), member) for side, member in zip(sides, members, strict=True)]
    sizes = [
        int(tokens.sel(channel=side[0]).values[member >= 0].sum()) for side, member in zip(sides, members, strict=True)
    ]
    return Comparison(
        a=summed[0],
        b=summed[1],
        tokens=(sizes[0], sizes[1]),
        paired=between != "task",
        unit=unit,
        description=f"{names[0]} against {names[1]}",
    )


def _sum_by(counts: xr.DataArray, unit: np.ndarray) -> Int[np.ndarray, "unit layer expert"]:
    """Sums of a channel's counts over the sequences of each unit, in order of the unit's number."""
    used = np.flatnonzero(unit >= 0)
    used = used[np.argsort(unit[used], kind="stable")]
    starts = np.flatnonzero(np.diff(unit[used], prepend=-1))
    values = counts.transpose("sequence", "layer", ...).isel(sequence=used).values
    return np.add.reduceat(values, starts, axis=0, dtype=np.int64)


def describe_parameters(**parameters: Any) -> str:
    """Parameters of a study as one line of text, those at None left out."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items() if value is not None)
