"""Examples of experts are the largest gates and a fair sample, whatever the units and the order of merging."""

import itertools
import random

import numpy as np
import pytest

from workbench.harmony.labels import CHANNELS
from workbench.runs import examples

EXPERTS = 5


def tokens_of(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((2, n, EXPERTS)), -1)[..., :2].astype(np.uint8)
    gates = np.round(rng.random((2, n, 2)), 1).astype(np.float16)  # many are equal
    sequence = np.sort(rng.integers(0, max(1, n // 40), n)).astype(np.int32)
    position = np.concatenate([np.arange(c) for c in np.bincount(sequence)]).astype(np.int32)
    return (
        chosen,
        gates,
        {"sequence": sequence, "position": position, "channel": rng.integers(0, 3, n).astype(np.uint8)},
    )


def part(data: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]], rows: slice, n: int = 4) -> examples.Lists:
    chosen, gates, tokens = data
    own = {name: values[rows] for name, values in tokens.items()}
    return examples.of_tokens(chosen[:, rows], gates[:, rows], own, num_experts=EXPERTS, n=n)


def same(one: examples.Lists, other: examples.Lists) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_top_examples_are_those_of_a_plain_sort() -> None:
    data = tokens_of(600)
    chosen, gates, tokens = data
    lists = part(data, slice(None))
    for channel, layer, expert in np.ndindex(len(CHANNELS), 2, EXPERTS):
        rows = [
            (-float(gates[layer, t, s]), int(tokens["sequence"][t]), int(tokens["position"][t]))
            for t, s in np.argwhere(chosen[layer] == expert)
            if tokens["channel"][t] == channel
        ]
        place = (channel, layer, expert)
        columns = [lists[f"top_{name}"][place] for name in ("gate", "sequence", "position")]
        got = [(-float(g), int(q), int(p)) for g, q, p in zip(*columns, strict=True) if q >= 0]
        assert got == sorted(rows)[:4]
        at = {(q, p) for _, q, p in rows}
        drawn = list(zip(*(lists[f"random_{name}"][place].tolist() for name in ("sequence", "position")), strict=True))
        assert len(set(drawn) - {(-1, -1)}) == min(4, len(rows))
        assert set(drawn) - {(-1, -1)} <= at


def test_lists_of_any_parts_in_any_order_are_those_of_all_tokens() -> None:
    data = tokens_of(600)
    complete = part(data, slice(None))
    edges = [0, 7, 200, 201, 450, 600]
    parts = [part(data, slice(a, b)) for a, b in itertools.pairwise(edges)]
    for seed in range(5):
        random.Random(seed).shuffle(parts)
        assert same(examples.merged(parts), complete)
    wrong = examples.merged([{**p, "top_gate": -p["top_gate"]} for p in parts])
    assert not same(wrong, complete), "a merge that prefers small gates is noticed"


def test_the_sample_is_uniform_over_tokens_and_layers_differ() -> None:
    """Each of 400 tokens of one expert is drawn about equally often over many layers, unlike by the first in order."""
    n, layers, size = 400, 500, 16
    place = np.arange(n)
    zeros = np.zeros((layers, n, 1), dtype=np.uint8)
    tokens = {"sequence": place // 20, "position": place % 20, "channel": np.zeros(n, dtype=np.uint8)}
    lists = examples.of_tokens(zeros, zeros + np.float16(1), tokens, num_experts=1, n=size)
    counts = {}
    for kind in ("random", "top"):
        rows = lists[f"{kind}_sequence"][0, :, 0] * 20 + lists[f"{kind}_position"][0, :, 0]
        counts[kind] = np.bincount(rows.ravel(), minlength=n)
    expected = layers * size / n
    statistic = {kind: ((c - expected) ** 2 / expected).sum() for kind, c in counts.items()}
    assert statistic["random"] < 520, "chi-square with 399 degrees of freedom"
    assert statistic["top"] > 10_000, "the negative control: equal gates are listed in order"


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens_leave_places_empty(n: int) -> None:
    data = tokens_of(40)
    lists = part(data, slice(0, n))
    assert (lists["top_sequence"] >= 0).sum() == 2 * 2 * n
    assert ((lists["top_sequence"] < 0) == (lists["top_position"] < 0)).all()
