"""The largest activations of single expert neurons, by channel: the lists that a capture recorded, merged over units.

    lists = neuron_examples.of_expert(run, layer=2, expert=5)      # "activation", "sequence", "position"
    lists["activation"]                                           # [channel neuron example], largest first
    lists["random_activation"]                                    # [channel neuron example], at a sample of its tokens

Largest means by absolute value. Each unit holds lists of a fixed size (`--record neurons`), so the memory of a capture
does not grow with the run.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from workbench.errors import InputError
from workbench.runs import shards
from workbench.runs.examples import sample_keys
from workbench.runs.manifest import reading
from workbench.runs.schema import N_NEURON_EXAMPLES, N_NEURON_RANDOM
from workbench.runs.schema import NEURON_FIELDS as FIELDS


def of_expert(run: Any, layer: int, expert: int) -> dict[str, np.ndarray]:
    """Return the lists [channel neuron example] of an expert's neurons; places without a token have the sequence −1.

    The names with random_ are of the random sample; its places are [channel example], the same for all neurons.

    Examples of excluded sequences are left out: lists are then shorter than those of a capture without the sequences.

    Raises:
        InputError: the run recorded no neurons, or not those of this layer, or has no such expert.
    """
    layers = run.spec.neuron_layers
    if layer not in layers:
        known = f"recorded those of the layers {', '.join(map(str, layers))}" if layers else "recorded no neurons"
        raise InputError(f"neurons of layer {layer}: {run.path} {known}: capture with --record neurons:{layer}")
    if not 0 <= expert < run.model["num_experts"]:
        raise InputError(f"expert {expert}: the model has experts 0 to {run.model['num_experts'] - 1}")
    place, units = layers.index(layer), np.flatnonzero(run.committed).tolist()
    if not units:
        raise InputError(f"{run.path} holds no sequence yet: wait for its capture")

    def stored(name: str) -> np.ndarray:
        parts = [_of_unit(run, f"neurons/{name}", unit)[:, place, expert] for unit in units]
        return np.concatenate(parts, axis=-1)

    largest = _largest(run, {name: stored(name) for name in FIELDS})
    sample = _sample(run, {name: stored(f"random_{name}") for name in FIELDS}, layer, expert)
    return largest | {f"random_{name}": values for name, values in sample.items()}


def _largest(run: Any, both: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the largest activations of the units' lists [channel neuron example]."""
    visible = np.isin(both["sequence"], run.sequences.index.to_numpy())
    size = np.where(visible, np.abs(both["activation"].astype(np.float32)), -1)
    order = np.lexsort((both["position"], both["sequence"], -size), axis=-1)[..., :N_NEURON_EXAMPLES]
    shown = np.take_along_axis(size, order, -1) >= 0
    fills = {name: np.array(fill, dtype) for name, (dtype, fill) in FIELDS.items()}
    return {n: np.where(shown, np.take_along_axis(values, order, -1), fills[n]) for n, values in both.items()}


def _sample(run: Any, both: Mapping[str, np.ndarray], layer: int, expert: int) -> dict[str, np.ndarray]:
    """Return the random sample of the whole run from those of its units; the smallest keys are the sample."""
    visible = np.isin(both["sequence"], run.sequences.index.to_numpy())
    keys = np.where(visible, sample_keys(both["sequence"], both["position"], layer, expert), np.uint64(1 << 63))
    order = np.argsort(keys, axis=-1, kind="stable")[..., :N_NEURON_RANDOM]
    shown = np.take_along_axis(visible, order, -1)
    variables = {
        name: np.where(shown, np.take_along_axis(both[name], order, -1), np.array(FIELDS[name][1], FIELDS[name][0]))
        for name in ("sequence", "position")
    }
    values = np.take_along_axis(both["activation"], order[:, None], -1)
    return variables | {"activation": np.where(shown[:, None], values, np.float16(0))}


def _of_unit(run: Any, path: str, unit: int) -> np.ndarray:
    with reading(run.storage, path):
        return shards.read(run.group[path], run.checked, path, unit, unit + 1, 0)[0]


def problems(
    lists: Mapping[str, np.ndarray],
    tokens: Mapping[str, Int[np.ndarray, " token"]],
    experts: Int[np.ndarray, "layer token slot"],
) -> Iterator[str]:
    """Yield what is wrong with the lists [channel layer expert neuron example] of a unit.

    tokens: `sequence`, `position` and `channel` of the unit's tokens, ascending. experts: of the lists' layers.
    """
    for kind in ("", "random_"):
        places = {name: lists[kind + name] for name in ("sequence", "position")}
        filled = places["sequence"] >= 0
        yield from _wrong_places(f"neurons/{kind}position", places, filled, tokens, experts)
        if not np.isfinite(lists[f"{kind}activation"].astype(np.float32)).all():
            yield f"neurons/{kind}activation is not finite"
    size = np.where(lists["sequence"] >= 0, np.abs(lists["activation"].astype(np.float32)), -1)
    if (np.diff(size, axis=-1) > 0).any():
        yield "neurons/activation does not descend"


def _wrong_places(
    name: str,
    places: Mapping[str, np.ndarray],
    filled: Bool[np.ndarray, "*cells"],
    tokens: Mapping[str, Int[np.ndarray, " token"]],
    experts: Int[np.ndarray, "layer token slot"],
) -> Iterator[str]:
    """Yield what is wrong with places [channel layer expert ...] of tokens, of which some are filled."""
    channel, layer, expert = (index[filled] for index in np.indices(filled.shape, sparse=False)[:3])
    key = tokens["sequence"].astype(np.int64) << 32 | tokens["position"].astype(np.int64)
    wanted = places["sequence"][filled].astype(np.int64) << 32 | places["position"][filled].astype(np.int64)
    row = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    if (key[row] != wanted).any():
        yield f"{name} names a token that is not in the unit"
    elif (tokens["channel"][row] != channel).any():
        yield f"{name} names a token of another channel"
    elif (experts[layer, row] != expert[:, None]).all(-1).any():
        yield f"{name} names a token that did not go to the expert"
