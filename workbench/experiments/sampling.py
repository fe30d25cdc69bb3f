"""Samples spread over tasks and efforts: no experiment takes the first sequences of a run, which may be of one task."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from workbench.harmony.transcripts import Transcript


def spread(strata: Sequence[Hashable], n: int) -> list[int]:
    """Return the indices, in order, of n members: as many of each stratum as possible, evenly spaced within it.

    strata: the stratum of every member. Where n is smaller than the number of strata, n of them are drawn with a fixed
    seed.
    """
    members: dict[Hashable, list[int]] = {}
    for i, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(i)
    order = [list(members)[i] for i in np.random.default_rng(0).permutation(len(members))]
    quota = dict.fromkeys(order, 0)
    left = min(n, len(strata))
    while left:
        for stratum in order:
            if left and quota[stratum] < len(members[stratum]):
                quota[stratum] += 1
                left -= 1
    # the middles of equal parts, so that a stratum with a quota of one does not always give its first member
    chosen = [members[s][int((i + 0.5) * len(members[s]) / k)] for s, k in quota.items() for i in range(k)]
    return sorted(chosen)


def task_of(row: Transcript) -> str:
    """Return the task of a sequence, or its domain where the task is not known."""
    return str(row.meta.get("task") or row.meta.get("domain") or "")


def spread_rows(rows: Sequence[Transcript], n: int) -> list[int]:
    """Return the indices of n sequences, spread over tasks and reasoning efforts."""
    return spread([(task_of(row), row.effort) for row in rows], n)


def halves(rows: Sequence[Transcript]) -> tuple[list[Transcript], list[Transcript]]:
    """Return the sequences in two halves without a common prompt, with about half of each task's prompts in either."""
    prompts = {row.prompt_id: task_of(row) for row in rows}
    ordered = sorted(prompts, key=lambda prompt: (prompts[prompt], prompt))
    first = set(ordered[::2])
    return [r for r in rows if r.prompt_id in first], [r for r in rows if r.prompt_id not in first]


def composition(rows: Sequence[Transcript]) -> dict[str, int]:
    """Return how many sequences each task and effort has in a sample, as "task, effort" → sequences."""
    return dict(sorted(Counter(", ".join(filter(None, (task_of(row), row.effort))) for row in rows).items()))
