"""Matched comparisons: which tokens are compared with which, and with what weight, within each prompt.

A comparison is linear in what the tokens have: the difference within a prompt is a sum of token values with weights
that add up to 1 on side a and to −1 on side b. Tokens of one sequence, channel, half and stratum share their weight, so
a run's tokens are counted by these cells once (`workbench.studies.run_index`), from which every comparison is computed.

Two channels, and two halves of a channel, are compared within each sequence that has both; two efforts within each
prompt that has both; two runs token by token. Nothing else is paired: prompts with one side alone are left out and
counted. Two tasks have no prompt in common, so they are an unpaired comparison, which every summary names so.

Reference: Imbens & Rubin 2015, Causal Inference, chapters 9 and 10 (stratification, pairwise randomised experiments).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Bool, Float, Int, Num

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.studies.intervals import MIN_PROMPTS
from workbench.studies.run_index import MAX_TOKEN_IDS, Cells, Control, RunIndex, TokenRun

Between = Literal["channel", "effort", "task", "half", "run"]

HALF_WEIGHT = 10  # matched tokens with which a prompt has half its full weight


class Plan(NamedTuple):
    """Which two sides are compared: `a` and `b` of `between`, with what else is held fixed."""

    between: Between
    a: str
    b: str
    channel: str | None = None
    effort: str | None = None
    task: str | None = None
    unpaired: bool = False

    @property
    def paired(self) -> bool:
        """Return whether the sides are compared within prompts."""
        return self.between != "task" and not self.unpaired

    def label(self, side: int) -> str:
        """Return the name of side 0 (a) or 1 (b)."""
        label = (self.a, self.b)[side]
        texts = {
            "half": f"the {label} half of {self.channel}",
            "channel": label,
            "effort": f"{self.channel} at {label} effort",
            "task": f"{self.channel} in {label}",
            "run": f"{self.channel} of run {label}",
        }
        return texts[self.between]


@dataclass(frozen=True)
class Matching:
    """The weight of a token of every cell in its prompt's difference (a − b) and in its prompt's mean of side b."""

    difference: Float[np.ndarray, " cell"]
    side_a: Float[np.ndarray, " cell"]
    side_b: Float[np.ndarray, " cell"]
    prompt: Int[np.ndarray, " cell"]
    prompt_weight: Float[np.ndarray, " prompt"]  # 0: the prompt takes no part
    in_a: Bool[np.ndarray, " prompt"]
    in_b: Bool[np.ndarray, " prompt"]
    tokens: tuple[int, int]
    strata: int
    excluded: tuple[int, int, int]  # prompts, sequences, tokens on one of the sides that take no part


def check_plan(run: TokenRun, plan: Plan) -> None:
    """Refuse a comparison whose labels the run does not have.

    Raises:
        InputError: a channel, effort or task is unknown, or the channel to look at is missing.
    """
    table = run.sequences
    if plan.between != "channel" and plan.channel not in CHANNELS:
        raise InputError(f"a comparison between {plan.between}s needs a channel to look at: {', '.join(CHANNELS)}")
    if plan.between == "channel" and (unknown := {plan.a, plan.b} - set(CHANNELS)):
        raise InputError(f"channel {min(unknown)!r} is unknown; choose from {', '.join(CHANNELS)}")
    if plan.between == "half" and {plan.a, plan.b} != {"first", "second"}:
        raise InputError(f"halves {plan.a!r} and {plan.b!r} are unknown; choose first and second")
    for name, fixed in (("effort", plan.effort), ("task", plan.task)):
        wanted = [plan.a, plan.b] if plan.between == name else [v for v in (fixed,) if v]
        if missing := [w for w in wanted if w not in set(table[name])]:
            known = ", ".join(sorted(set(table[name])))
            raise InputError(f"{name} {missing[0]!r} is not in this run; it has {known}")


def sides(run: TokenRun, plan: Plan, cells: Cells) -> Int[np.ndarray, " cell"]:
    """Return which side of a comparison each cell is on: 0 (a), 1 (b), or −1 for neither."""
    table = run.sequences
    size = int(table.index.max()) + 1 if len(table) else 0
    allowed, of_sequence = np.zeros(size, dtype=bool), np.full(size, -1)
    chosen = pd.Series(True, index=table.index)
    for name, value in (("effort", plan.effort), ("task", plan.task)):
        chosen &= True if value is None else table[name] == value
    allowed[table.index] = chosen
    side = np.full(len(cells.code), -1)
    if plan.between == "channel":
        for number, label in enumerate((plan.a, plan.b)):
            side[cells.channel == CHANNELS.index(label)] = number
    else:
        inside = cells.channel == CHANNELS.index(str(plan.channel))
        if plan.between == "half":
            own = cells.half if plan.a == "first" else 1 - cells.half
        else:
            for number, label in enumerate((plan.a, plan.b)):
                of_sequence[table.index[table[plan.between] == label]] = number
            own = of_sequence[cells.sequence]
        side = np.where(inside, own, -1)
    return np.where(allowed[cells.sequence], side, -1)


def match(index: RunIndex, plan: Plan, control: Control, finite: str = "") -> Matching:
    """Return the weights of a comparison with a control: none, like positions, or the same token ids."""
    cells = index.cells("token" if control == "token" else "position", finite)
    side = sides(index.run, plan, cells)
    within_sequence = plan.between in ("channel", "half")
    return match_cells(cells, side, index.prompts[0], control, paired=plan.paired, within_sequence=within_sequence)


def match_cells(
    cells: Cells,
    side: Int[np.ndarray, " cell"],
    number: Int[np.ndarray, " sequence"],
    control: Control,
    *,
    paired: bool = True,
    within_sequence: bool,
) -> Matching:
    """Return the weights of a comparison of cells on side 0 and 1 (−1: on neither); number: every sequence's prompt.

    within_sequence: take differences within each sequence that has both sides, else between means of its prompt's.
    """
    prompt = number[cells.sequence]
    n_prompts = int(number.max(initial=-1)) + 1
    within_sequence = paired and within_sequence
    group = cells.sequence if within_sequence else prompt
    take = side >= 0
    if paired:
        take &= _has_both(group, side)[group]
    if not paired and control != "none":
        take[:] = False
    if control == "none":
        difference, weight = _means(cells, side, prompt, take), _present(prompt, take, n_prompts).astype(np.float64)
    elif control == "position" and within_sequence:
        difference, tokens = _adjusted(cells, side, prompt, take, n_prompts)
        weight = tokens / (tokens + HALF_WEIGHT)
    else:
        difference, tokens = _stratified(cells, side, group, prompt, take, n_prompts)
        weight = tokens / (tokens + HALF_WEIGHT)
    take &= (weight > 0)[prompt] & (difference != 0)
    side_a, side_b = (np.where(take & (side == s), np.abs(difference), 0.0) for s in (0, 1))
    if control == "position" and within_sequence:
        side_b = np.abs(np.where(side == 1, _means(cells, side, prompt, take), 0.0))
        side_a = side_b + difference
    counted = [int(cells.tokens[take & (side == s)].sum()) for s in (0, 1)]
    on_side = side >= 0
    excluded = [len(np.unique(v[on_side])) - len(np.unique(v[take])) for v in (prompt, cells.sequence)]
    tokens_excluded = int(cells.tokens[on_side].sum()) - sum(counted)
    strata = 1 if control == "none" else len(np.unique(cells.stratum[take]))
    present = [_present(prompt, take & (side == s), n_prompts) for s in (0, 1)]
    return Matching(
        np.where(take, difference, 0.0),
        side_a,
        side_b,
        prompt,
        weight,
        present[0],
        present[1],
        (counted[0], counted[1]),
        strata if take.any() else 0,
        (excluded[0], excluded[1], tokens_excluded),
    )


def match_runs(index: RunIndex, channel: str, finite: str = "") -> Matching:
    """Return the weights of a channel's tokens in the mean of each prompt: the same for both of two runs."""
    cells, number = index.cells("position", finite), index.prompts[0]
    take, prompt = cells.channel == CHANNELS.index(channel), number[cells.sequence]
    present = _present(prompt, take, int(number.max(initial=-1)) + 1)
    weight = _means(cells, np.where(take, 0, -1), prompt, take)
    tokens, none = int(cells.tokens[take].sum()), np.zeros(len(weight))
    return Matching(
        weight, none, none, prompt, present.astype(np.float64), present, present, (tokens, tokens), 1, (0, 0, 0)
    )


def prompt_means(
    sums: Float[np.ndarray, "sequence *cells"],
    tokens: Num[np.ndarray, " sequence"],
    number: Int[np.ndarray, " sequence"],
) -> Float[np.ndarray, "prompt *cells"]:
    """Return means over the tokens of each sequence, then over a prompt's; prompts without a token are left out."""
    present = tokens > 0
    means = sums[present] / tokens[present].reshape(-1, *[1] * (sums.ndim - 1))
    _, prompt, sequences = np.unique(number[present], return_inverse=True, return_counts=True)
    total = np.zeros((len(sequences), *sums.shape[1:]))
    np.add.at(total, prompt, means)
    return np.asarray(total / sequences.reshape(-1, *[1] * (sums.ndim - 1)))


def check_prompts(plan: Plan, matching: Matching) -> None:
    """Refuse a comparison of too few prompts.

    Raises:
        InputError: fewer than `MIN_PROMPTS` prompts have both sides (unpaired: either side).
    """
    n_a, n_b = int(matching.in_a.sum()), int(matching.in_b.sum())
    if min(n_a, n_b) < MIN_PROMPTS:
        counted = f"{count_of(n_a, 'prompt')} with both" if plan.paired else f"{n_a} and {count_of(n_b, 'prompt')}"
        raise InputError(
            f"{plan.label(0)} cannot be compared with {plan.label(1)}: {counted}, and at least {MIN_PROMPTS} are needed"
        )


def _present(prompt: np.ndarray, take: np.ndarray, n_prompts: int) -> Bool[np.ndarray, " prompt"]:
    return np.bincount(prompt[take], minlength=n_prompts) > 0


def _has_both(group: Int[np.ndarray, " cell"], side: Int[np.ndarray, " cell"]) -> Bool[np.ndarray, " group"]:
    """Return which groups have a cell on either side."""
    size = int(group.max(initial=-1)) + 1
    return np.logical_and(*(np.bincount(group[side == s], minlength=size) > 0 for s in (0, 1)))


def _means(cells: Cells, side: np.ndarray, prompt: np.ndarray, take: np.ndarray) -> Float[np.ndarray, " cell"]:
    """Return weights of tokens in means over a sequence and side, then a prompt's sequences; −: side b."""
    out = np.zeros(len(cells.code))
    for s, sign in ((0, 1), (1, -1)):
        at = np.flatnonzero(take & (side == s))
        if len(at):
            tokens = np.bincount(cells.sequence[at], cells.tokens[at])
            present = np.flatnonzero(tokens)
            of = np.full(len(tokens), -1)
            of[cells.sequence[at]] = prompt[at]
            sequences = np.bincount(of[present])
            out[at] = sign / tokens[cells.sequence[at]] / sequences[prompt[at]]
    return out


def _stratified(
    cells: Cells, side: np.ndarray, group: np.ndarray, prompt: np.ndarray, take: np.ndarray, n_prompts: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " prompt"]]:
    """Differences within each group's strata, averaged over a prompt's with weight n_a n_b / (n_a + n_b)."""
    at = np.flatnonzero(take)
    out = np.zeros(len(cells.code))
    code, stratum = np.unique(group[at].astype(np.int64) * MAX_TOKEN_IDS + cells.stratum[at], return_inverse=True)
    n = np.stack([np.bincount(stratum, cells.tokens[at] * (side[at] == s), len(code)) for s in (0, 1)])
    matched = np.divide(n[0] * n[1], n.sum(0), out=np.zeros(len(code)), where=n.sum(0) > 0)
    prompt_of = np.zeros(len(code), dtype=np.int64)
    prompt_of[stratum] = prompt[at]
    total = np.bincount(prompt_of, matched, n_prompts)
    own, of_side = matched[stratum], n[side[at], stratum]
    used = own > 0
    out[at[used]] = own[used] / total[prompt[at[used]]] / of_side[used] * np.where(side[at[used]] == 0, 1, -1)
    return out, total


def _adjusted(
    cells: Cells, side: np.ndarray, prompt: np.ndarray, take: np.ndarray, n_prompts: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " prompt"]]:
    """Return weights of the side's coefficient in a least-squares fit of each prompt on side, sequence and stratum.

    No token of a sequence shares its position with another, so sides are compared across a prompt's sequences, less
    what the sequences (their efforts) and the strata of position differ by on the other side.
    """
    out, information = np.zeros(len(cells.code)), np.zeros(n_prompts)
    at = np.flatnonzero(take)
    at = at[np.argsort(prompt[at], kind="stable")]
    starts = np.flatnonzero(np.diff(prompt[at], prepend=-1))
    for own in np.split(at, starts[1:]) if len(at) else ():
        sequence = np.unique(cells.sequence[own], return_inverse=True)[1]
        if sequence.max() == 0:
            continue  # one sequence has no two tokens at one position
        stratum = np.unique(cells.stratum[own], return_inverse=True)[1]
        root = np.sqrt(cells.tokens[own])
        rows = np.arange(len(own))
        fixed = np.zeros((len(own), int(sequence.max()) + int(stratum.max()) + 2))
        fixed[rows, sequence] = fixed[rows, int(sequence.max()) + 1 + stratum] = root
        target = root * (side[own] == 0)
        residual = target - fixed @ np.linalg.lstsq(fixed, target, rcond=None)[0]
        amount = float(residual @ residual)
        if amount > 1e-6:
            out[own] = residual / root / amount
            information[prompt[own[0]]] = amount
    out[np.abs(out) < 1e-12] = 0
    return out, information


def sums_by_prompt(
    weights: Float[np.ndarray, "sum cell"], prompt: Int[np.ndarray, " cell"], values: Float[np.ndarray, "cell d"]
) -> Iterator[tuple[Int[np.ndarray, " local"], Float[np.ndarray, "local d"]]]:
    """Yield for each row of weights the prompts that have a weight, and the weighted sums of their cells' values."""
    for weight in weights:
        at = np.flatnonzero(weight)
        present, local = np.unique(prompt[at], return_inverse=True)
        matrix = scipy.sparse.csr_array((weight[at], (local, at)), shape=(len(present), len(values)))
        yield present, np.asarray(matrix @ values)
