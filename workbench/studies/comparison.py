"""The sequences and tokens of an estimate: cells of a run, and pairs or groups to compare.

A *cell* is the tokens of some channels in the sequences of one effort or task. A *comparison* sets two conditions side
by side, with as much held equal as the run allows: two channels of the same sequence, two efforts of the same prompt
(and the same channel), or, where nothing can be paired, the prompts of two tasks.

The sampling unit is the prompt: its samples, and its answers at three efforts, resemble each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int, Integer, Num

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.messages import EFFORTS
from workbench.studies.statistics import share

# sequences that state no effort (or no task) are still data
UNSTATED = "unstated"

Between = Literal["channel", "effort", "task"]


@runtime_checkable
class Run(Protocol):
    """What a study needs of a run; `workbench.open_run` gives one."""

    @property
    def digest(self) -> str:
        """Return a digest of what is visible of the run."""

    def summary(self, name: str) -> xr.DataArray:
        """Return sums per sequence and channel, with coordinates `channel`, `id`, `effort`, `prompt_id` and `task`."""


class Condition(NamedTuple):
    """One side of a comparison; None does not restrict."""

    channel: str
    effort: str | None
    task: str | None

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class Cell:
    """Channels pooled over their tokens, and the sequences (places in the run) whose tokens they are."""

    labels: Mapping[str, str]
    channels: tuple[str, ...]
    sequences: Int[np.ndarray, "sequence"]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: counts of its sequences, and the number of each sequence's prompt."""

    counts: Integer[np.ndarray, "sequence layer expert"]
    prompt: Int[np.ndarray, "sequence"]
    n_tokens: int
    sequences: Int[np.ndarray, "sequence"]  # places in the run

    @property
    def n_prompts(self) -> int:
        """Return the number of different prompts."""
        return len(np.unique(self.prompt))

    def mean_share(self, layer: int) -> Float[np.ndarray, "prompt expert"]:
        """Load shares of one layer, averaged over each prompt's sequences; prompts in order of their numbers."""
        _, n_sequences = np.unique(self.prompt, return_counts=True)
        return sum_by(share(self.counts[:, layer]), self.prompt) / n_sequences[:, None]


@dataclass(frozen=True)
class Comparison:
    """Both sides of a comparison; when `paired`, prompt i of either is the same prompt."""

    a: Side
    b: Side
    paired: bool


def labels(summary: xr.DataArray, name: str) -> np.ndarray:
    """Return the effort, task or prompt of every sequence [sequence], as text; unknown ones are labelled so."""
    values = summary.coords[name].values if name in summary.coords else np.full(summary.sizes["sequence"], "")
    return np.array([UNSTATED if pd.isna(value) or value == "" else str(value) for value in values], dtype=object)


def in_order(values: Sequence[str]) -> list[str]:
    """Return distinct labels: efforts from low to high, others in alphabetical order."""
    return sorted(set(values), key=lambda value: (EFFORTS.index(value) if value in EFFORTS else len(EFFORTS), value))


def known_channels(summary: xr.DataArray, channels: Sequence[str] | None = None) -> list[str]:
    """Return the requested channels, by default all of the run.

    Raises:
        InputError: the run does not have a channel.
    """
    known = [str(name) for name in summary.coords["channel"].values]
    for channel in channels or ():
        if channel not in known:
            raise InputError(f"channel {channel!r} is not in this run; it has {', '.join(known)}")
    return list(dict.fromkeys(channels or known))


def axes(summary: xr.DataArray, by: Sequence[str], channels: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the labels along each axis that splits a run into cells.

    Raises:
        InputError: `by` is not possible, or the run is empty.
    """
    wrong = [axis for axis in by if axis not in ("channel", "effort", "task")]
    if wrong or len(set(by)) != len(by):
        raise InputError(f"by={tuple(by)!r} is not valid; give each of channel, effort and task at most once")
    if not summary.sizes["sequence"]:
        raise InputError("the run holds no sequence yet; a study needs at least one: wait for its capture")
    chosen = known_channels(summary, channels)
    return {axis: chosen if axis == "channel" else in_order(list(labels(summary, axis))) for axis in by}


def cells(tokens: xr.DataArray, by: Sequence[str], channels: Sequence[str] | None = None) -> Iterator[Cell]:
    """Yield every cell of a run, also without a token; sequences without a token in a cell are left out."""
    split = axes(tokens, by, channels)
    for place in product(*split.values()):
        label_of = dict(zip(split, place, strict=True))
        within = (label_of["channel"],) if "channel" in label_of else tuple(known_channels(tokens, channels))
        chosen = tokens.sel(channel=list(within)).sum("channel").values > 0
        for axis in set(label_of) - {"channel"}:
            chosen &= labels(tokens, axis) == label_of[axis]
        yield Cell(label_of, within, np.flatnonzero(chosen))


def conditions(
    between: Between,
    a: str,
    b: str,
    *,
    channel: str | None = None,
    effort: str | None = None,
    task: str | None = None,
) -> tuple[Condition, Condition]:
    """Return both sides of a comparison between `a` and `b`; the given conditions are held fixed.

    Raises:
        InputError: the combination of conditions is not possible.
    """
    fixed = {"channel": channel, "effort": effort, "task": task}
    if between not in fixed:
        raise InputError(f"between={between!r} is unknown; choose channel, effort or task")
    if fixed[between] is not None:
        raise InputError(
            f"{between}={fixed[between]!r} cannot be fixed in a comparison between {between}s: leave it out"
        )
    if a == b:
        raise InputError(f"{between} {a!r} cannot be compared with itself; give two different ones")
    if between == "channel":
        return Condition(a, effort, task), Condition(b, effort, task)
    if channel is None:
        raise InputError(f"a comparison between {between}s needs the channel to look at, such as channel='analysis'")
    if between == "effort":
        return Condition(channel, a, task), Condition(channel, b, task)
    return Condition(channel, effort, a), Condition(channel, effort, b)


def has_tokens(tokens: xr.DataArray, side: Condition) -> Bool[np.ndarray, "sequence"]:
    """Return whether each sequence [sequence] has tokens on this side of a comparison.

    Raises:
        InputError: the run does not have a channel, effort or task.
    """
    known_channels(tokens, [side.channel])
    present = np.asarray(tokens.sel(channel=side.channel).values > 0)
    for name, wanted in (("effort", side.effort), ("task", side.task)):
        if wanted is not None:
            known = in_order(list(labels(tokens, name)))
            if wanted not in known:
                raise InputError(f"{name} {wanted!r} is not in this run; it has {', '.join(known)}")
            present &= labels(tokens, name) == wanted
    return present


def prompts(tokens: xr.DataArray) -> Int[np.ndarray, "sequence"]:
    """Return the number of every sequence's prompt; a sequence that names none stands for itself."""
    prompt_ids = labels(tokens, "prompt_id")
    alone = [f"{UNSTATED} {number}" for number in range(len(prompt_ids))]
    _, number = np.unique(np.where(prompt_ids == UNSTATED, alone, prompt_ids).astype(str), return_inverse=True)
    return number


def prompt_ids(sequences: pd.DataFrame) -> pd.Series:
    """Return the prompt of every sequence of a run's table; a sequence that names none stands for itself."""
    return sequences["prompt_id"].where(sequences["prompt_id"] != "", sequences["id"])


def prompt_numbers(sequences: pd.DataFrame) -> Int[np.ndarray, "sequence"]:
    """Return the number of every sequence's prompt by the sequence's number in the run; -1 where it is not written."""
    numbers = np.full(int(sequences.index.max()) + 1 if len(sequences) else 0, -1)
    numbers[sequences.index] = np.unique(prompt_ids(sequences), return_inverse=True)[1]
    return numbers


def in_second_half(
    sequence: Int[np.ndarray, " token"], inside: Bool[np.ndarray, " token"]
) -> Bool[np.ndarray, " token"]:
    """Return which tokens are in the second half of the tokens `inside`, such as a channel's, of their sequence.

    sequence: the number of each token's sequence, tokens of a sequence together.
    """
    ones = inside.astype(np.int64)
    starts = np.flatnonzero(np.diff(sequence, prepend=-2))
    lengths = np.diff(np.append(starts, len(sequence)))
    before = np.cumsum(ones) - ones
    rank = before - np.repeat(before[starts], lengths)
    total = np.repeat(np.add.reduceat(ones, starts), lengths)
    return 2 * rank >= total


def members(
    tokens: xr.DataArray,
    between: Between,
    sides: tuple[Condition, Condition],
    prompt: Int[np.ndarray, "sequence"] | None = None,
) -> tuple[Int[np.ndarray, "sequence_a"], Int[np.ndarray, "sequence_b"]]:
    """Return sequences on either side: between channels those with both, between efforts those of prompts with both."""
    prompt = prompts(tokens) if prompt is None else prompt
    first, second = (has_tokens(tokens, side) for side in sides)
    if between == "channel":
        first = second = first & second
    elif between == "effort":
        shared = np.intersect1d(prompt[first], prompt[second])
        first, second = (chosen & np.isin(prompt, shared) for chosen in (first, second))
    return np.flatnonzero(first), np.flatnonzero(second)


def compare(
    counts: xr.DataArray,
    tokens: xr.DataArray,
    between: Between,
    sides: tuple[Condition, Condition],
    prompt: Int[np.ndarray, "sequence"] | None = None,
) -> Comparison:
    """Return the counts of both sides of a comparison.

    prompt: the number of every sequence's prompt, if not that of its id.

    Raises:
        InputError: a side has fewer than two prompts.
    """
    prompt = prompts(tokens) if prompt is None else prompt
    a, b = (
        Side(
            counts.sel(channel=side.channel).transpose("sequence", "layer", "expert").isel(sequence=chosen).values,
            prompt[chosen],
            int(tokens.sel(channel=side.channel).values[chosen].sum()),
            chosen,
        )
        for side, chosen in zip(sides, members(tokens, between, sides, prompt), strict=True)
    )
    paired = between != "task"
    if min(a.n_prompts, b.n_prompts) < 2:
        available = (
            f"{count_of(a.n_prompts, 'prompt')} with both"
            if paired
            else f"{a.n_prompts} and {count_of(b.n_prompts, 'prompt')}"
        )
        raise InputError(f"{sides[0]} cannot be compared with {sides[1]}: {available}, and at least 2 are needed")
    return Comparison(a, b, paired)


def places(summary: xr.DataArray) -> dict[str, np.ndarray]:
    """Return the layer numbers [layer] and expert numbers [expert] of a summary."""
    return {name: np.asarray(summary[name].values) for name in ("layer", "expert")}


def sum_by(
    values: Num[np.ndarray, "sequence *cells"], group: Int[np.ndarray, "sequence"]
) -> Num[np.ndarray, "group *cells"]:
    """Return sums over the sequences of each group, in order of the groups' numbers."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return np.add.reduceat(values[order], starts, axis=0, dtype=np.result_type(values, np.int64))
