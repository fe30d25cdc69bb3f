"""Examples of every expert by channel: the tokens of its largest gate weights, and a random sample of its tokens.

Each unit keeps a fixed number of both for every layer, expert and channel, so the memory does not grow with the run.
A token's place in the random order is a hash of its sequence, position, layer and expert, and equal gate weights are
ordered by sequence and position. Hence lists of any parts of a run, merged in any order, are those of the whole run.

Reference: Efraimidis & Spirakis 2006 (a sample of fixed size as the smallest of random keys); the hash is splitmix64,
Steele et al. 2014.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from workbench.harmony.labels import CHANNELS
from workbench.runs import shards
from workbench.runs.manifest import reading
from workbench.runs.schema import EXAMPLE_FIELDS as FIELDS
from workbench.runs.schema import EXAMPLE_KINDS as KINDS
from workbench.runs.schema import N_EXAMPLES

Lists = dict[str, np.ndarray]  # "top_gate", "random_position", … [channel layer expert example]
_KEY_BITS = 48  # of a hash; 16 bits are left for the expert and channel


def of_tokens(
    experts: Int[np.ndarray, "layer token slot"],
    gates: Float[np.ndarray, "layer token slot"],
    tokens: Mapping[str, Int[np.ndarray, " token"]],
    *,
    num_experts: int,
    n: int = N_EXAMPLES,
) -> Lists:
    """Return the examples [channel layer expert example] of these tokens, in their order in the lists.

    tokens: `sequence`, `position` and `channel` of each, ascending in sequence and position. Places of a list that no
    token fills have the sequence −1.
    """
    n_cells = len(CHANNELS) * num_experts
    assert n_cells <= 1 << (64 - _KEY_BITS), "an expert and a channel share 16 bits of a sort key"
    layers, _, slots = experts.shape
    lists = empty(layers, num_experts, n)
    own = {name: np.repeat(np.asarray(tokens[name]), slots) for name in ("sequence", "position")}
    for layer in range(layers):
        expert, gate = experts[layer].ravel().astype(np.uint64), gates[layer].ravel().astype(np.float16)
        cell = np.repeat(np.asarray(tokens["channel"]).astype(np.uint64), slots) * np.uint64(num_experts) + expert
        descending = np.uint64(0xFFFF) - gate.view(np.uint16)  # the bits of gate weights, above 0, rise with them
        by_gate = descending << np.uint64(32) | np.arange(len(gate), dtype=np.uint64)
        order = {"top": by_gate, "random": sample_keys(own["sequence"], own["position"], layer, expert)}
        values = own | {"gate": gate}
        for kind, key in order.items():
            for name, rows in _first(cell, key, n_cells, n, values).items():
                lists[f"{kind}_{name}"][:, layer] = rows.reshape(len(CHANNELS), num_experts, n)
    return lists


def empty(layers: int, num_experts: int, n: int = N_EXAMPLES) -> Lists:
    """Return lists [channel layer expert example] without an example."""
    shape = (len(CHANNELS), layers, num_experts, n)
    return {f"{kind}_{name}": np.full(shape, fill, dtype) for kind in KINDS for name, (dtype, fill) in FIELDS.items()}


def sample_keys(
    sequence: Int[np.ndarray, "*place"], position: Int[np.ndarray, "*place"], layer: Any, expert: Any
) -> UInt64[np.ndarray, "*place"]:
    """Return the random keys of tokens at a layer's expert [*place], 48 bits each; the smallest are the sample."""
    token = np.asarray(sequence).astype(np.uint64) << np.uint64(32) | np.asarray(position).astype(np.uint64)
    where = np.asarray(layer).astype(np.uint64) << np.uint64(32) | np.asarray(expert).astype(np.uint64)
    return _mixed(_mixed(token) ^ _mixed(where + np.uint64(1))) >> np.uint64(64 - _KEY_BITS)


def _mixed(x: UInt64[np.ndarray, "*place"]) -> UInt64[np.ndarray, "*place"]:
    """Return splitmix64 of numbers: each bit of the result depends on all bits."""
    with np.errstate(over="ignore"):
        x = np.asarray(x) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _first(
    cell: UInt64[np.ndarray, " slot"],
    key: UInt64[np.ndarray, " slot"],
    n_cells: int,
    n: int,
    values: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return values [cell example] of the n smallest keys of each cell."""
    picked, there = smallest(cell, key, n_cells, n)
    return {
        name: np.where(there, values[name][picked] if len(cell) else fill, np.array(fill, dtype))
        for name, (dtype, fill) in FIELDS.items()
    }


def smallest(
    cell: UInt64[np.ndarray, " slot"], key: UInt64[np.ndarray, " slot"], n_cells: int, n: int
) -> tuple[Int[np.ndarray, "cell example"], Bool[np.ndarray, "cell example"]]:
    """Return the slots with the n smallest keys of each cell, in ascending order, and which of them there are."""
    order = np.argsort(cell << np.uint64(_KEY_BITS) | key)
    edges = np.searchsorted(cell[order], np.arange(n_cells + 1, dtype=np.uint64))
    rows = edges[:-1, None] + np.arange(n)
    there = rows < edges[1:, None]
    return order[np.where(there, rows, 0)] if len(order) else np.zeros(rows.shape, dtype=np.intp), there


def merged(parts: Iterable[Lists]) -> Lists:
    """Return the examples [channel layer expert example] of several parts of a run; parts of none are an error."""
    lists: Lists | None = None
    for part in parts:
        lists = part if lists is None else _merged_pair(lists, part)
    assert lists is not None, "at least one part is needed"
    return lists


def _merged_pair(one: Lists, other: Lists) -> Lists:
    n = one["top_gate"].shape[-1]
    lists: Lists = {}
    for kind in KINDS:
        both = {name: np.concatenate([part[f"{kind}_{name}"] for part in (one, other)], axis=-1) for name in FIELDS}
        missing = both["sequence"] < 0
        if kind == "top":
            key = -both["gate"].astype(np.float32)
        else:
            layer, expert = np.ogrid[: missing.shape[1], : missing.shape[2]]
            key = sample_keys(both["sequence"], both["position"], layer[..., None], expert[..., None])
        order = np.lexsort((both["position"], both["sequence"], key, missing), axis=-1)[..., :n]
        lists |= {f"{kind}_{name}": np.take_along_axis(values, order, -1) for name, values in both.items()}
    return lists


def of_run(run: Any) -> Lists:
    """Return the examples [channel layer expert example] of a run: the recorded ones, or those of its routing.

    Excluded sequences have no examples: then the lists are made again from the routing of the others.

    Raises:
        InputError: the run has no routing.
    """
    if "examples" in run.recorded and not run.excluded:
        return merged(_recorded(run))
    model = run.model
    blocks = (
        of_tokens(block["experts"], block["gates"], block, num_experts=model["num_experts"])
        for block in run.blocks("experts", "gates")
    )
    return merged([empty(model["n_layers"], model["num_experts"]), *blocks])


def _recorded(run: Any) -> Iterable[Lists]:
    """Yield the stored lists of every committed unit."""
    names = empty(0, 0)
    yield empty(run.model["n_layers"], run.model["num_experts"])
    for unit in np.flatnonzero(run.committed).tolist():
        yield {name: _of_unit(run, f"examples/{name}", unit) for name in names}


def _of_unit(run: Any, path: str, unit: int) -> np.ndarray:
    with reading(run.storage, path):
        return shards.read(run.group[path], run.checked, path, unit, unit + 1, 0)[0]
