"""The largest activations of single expert neurons, by channel: the lists that a capture recorded, merged over units.

    lists = neuron_examples.of_expert(run, layer=2, expert=5)      # "activation", "sequence", "position"
    lists["activation"]                                           # [channel neuron example], largest first

Largest means by absolute value. Each unit holds lists of a fixed size (`--record neurons`), so the memory of a capture
does not grow with the run.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from workbench.errors import InputError
from workbench.runs import shards
from workbench.runs.manifest import reading
from workbench.runs.schema import N_NEURON_EXAMPLES
from workbench.runs.schema import NEURON_FIELDS as FIELDS


def of_expert(run: Any, layer: int, expert: int) -> dict[str, np.ndarray]:
    """Return the lists [channel neuron example] of an expert's neurons; places without a token have the sequence −1.

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
    place = layers.index(layer)
    parts = [
        {name: _of_unit(run, f"neurons/{name}", unit)[:, place, expert] for name in FIELDS}
        for unit in np.flatnonzero(run.committed).tolist()
    ]
    if not parts:
        raise InputError(f"{run.path} holds no sequence yet: wait for its capture")
    both = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in FIELDS}
    visible = np.isin(both["sequence"], run.sequences.index.to_numpy())
    size = np.where(visible, np.abs(both["activation"].astype(np.float32)), -1)
    order = np.lexsort((both["position"], both["sequence"], -size), axis=-1)[..., :N_NEURON_EXAMPLES]
    shown = np.take_along_axis(size, order, -1) >= 0
    fills = {name: np.array(fill, dtype) for name, (dtype, fill) in FIELDS.items()}
    return {n: np.where(shown, np.take_along_axis(values, order, -1), fills[n]) for n, values in both.items()}


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
    activation, sequence, position = (lists[name] for name in FIELDS)
    filled = sequence >= 0
    channel, layer, expert = (index[filled] for index in np.indices(sequence.shape, sparse=False)[:3])
    key = tokens["sequence"].astype(np.int64) << 32 | tokens["position"].astype(np.int64)
    wanted = sequence[filled].astype(np.int64) << 32 | position[filled].astype(np.int64)
    row = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    if (key[row] != wanted).any():
        yield "neurons/position names a token that is not in the unit"
    elif (tokens["channel"][row] != channel).any():
        yield "neurons/position names a token of another channel"
    elif (experts[layer, row] != expert[:, None]).all(-1).any():
        yield "neurons/position names a token that did not go to the expert"
    size = np.where(filled, np.abs(activation.astype(np.float32)), -1)
    if not np.isfinite(size).all() or (np.diff(size, axis=-1) > 0).any():
        yield "neurons/activation does not descend"
