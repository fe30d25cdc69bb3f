"""Examples of the features of an autoencoder, by channel: the lists that a capture recorded, merged over units.

    lists = feature_examples.of_run(run, features=[12, 77])       # "top_activation", "top_sequence", "top_position"
    lists["random_activation"]                                    # [channel feature example], a sample of its tokens
    lists["count"], lists["tokens"]                               # [channel feature] tokens that have it, of [channel]

Each unit holds lists of a fixed size (`--record features:FOLDER`), so the memory of a capture does not grow with the
run; units are merged one after another, so that of reading does not either.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from workbench.errors import InputError
from workbench.runs import shards
from workbench.runs.examples import sample_keys
from workbench.runs.manifest import reading
from workbench.runs.schema import EXAMPLE_KINDS, FEATURE_FIELDS, N_FEATURE_EXAMPLES, FeatureLists

_NO_KEY = 2.0**64  # above every key of a token; keys of 48 bits and activations are exact as float64


def lists_of(run: Any, hook: str = "") -> FeatureLists:
    """Return the lists of a run's autoencoder at a hook point; the only ones if none is named.

    Raises:
        InputError: the run recorded no such lists, or several and none is named.
    """
    known = {lists.hook: lists for lists in getattr(getattr(run, "spec", None), "features", ())}
    if not known:
        raise InputError(
            f"{getattr(run, 'path', 'this run')} recorded no examples of features: capture with --record "
            "features:FOLDER of an autoencoder"
        )
    if hook in known or (not hook and len(known) == 1):
        return known[hook or next(iter(known))]
    problem = f"{hook!r} is not in {run.path}" if hook else f"{run.path} has several autoencoders"
    raise InputError(f"{problem}: name one of {', '.join(known)}")


def of_run(run: Any, hook: str = "", features: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Return the lists [channel feature example] of features, all by default.

    `count` [channel feature] are the tokens that have each feature, of the `tokens` [channel]. Places without a token
    have the sequence −1. Examples of excluded sequences are left out, and lists are then shorter than those of a
    capture without the sequences; counts are of all sequences of the run.

    Raises:
        InputError: the run recorded no such lists, or the autoencoder has no such feature.
    """
    about, units = lists_of(run, hook), np.flatnonzero(run.committed).tolist()
    if not units:
        raise InputError(f"{run.path} holds no sequence yet: wait for its capture")
    numbers = np.arange(about.d_sae) if features is None else np.asarray(features, dtype=np.int64)
    if wrong := [n for n in numbers.tolist() if not 0 <= n < about.d_sae]:
        raise InputError(f"feature {wrong[0]}: the autoencoder has features 0 to {about.d_sae - 1}")
    visible = run.sequences.index.to_numpy()
    lists: dict[str, np.ndarray] = {}
    for unit in units:
        own = {name: _of_unit(run, f"features/{about.hook}_{name}", unit)[:, numbers] for name in names()}
        for kind in EXAMPLE_KINDS:
            own |= {f"{kind}_{n}": v for n, v in _first(own, lists, kind, about, numbers, visible).items()}
        lists = own | {"count": own["count"].astype(np.int64) + lists.get("count", 0)}
    with reading(run.storage, "summaries/tokens"):
        return lists | {"tokens": np.asarray(run.group["summaries/tokens"][:]).sum(0, dtype=np.int64)}


def names() -> list[str]:
    """Return the names of the lists of an autoencoder."""
    return [*(f"{kind}_{name}" for kind in EXAMPLE_KINDS for name in FEATURE_FIELDS), "count"]


def _first(
    one: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    kind: str,
    about: FeatureLists,
    numbers: Int[np.ndarray, " feature"],
    visible: Int[np.ndarray, " sequence"],
) -> dict[str, np.ndarray]:
    """Return the lists of a kind of two parts of a run, in their order; the second part may be none yet."""
    parts = [part for part in (other, one) if part]
    both = {name: np.concatenate([part[f"{kind}_{name}"] for part in parts], axis=-1) for name in FEATURE_FIELDS}
    shown = np.isin(both["sequence"], visible)
    if kind == "top":
        key = -both["activation"].astype(np.float64)
    else:
        key = sample_keys(both["sequence"], both["position"], about.layer, numbers[:, None]).astype(np.float64)
    order = np.lexsort((both["position"], both["sequence"], np.where(shown, key, _NO_KEY)), axis=-1)
    order = order[..., :N_FEATURE_EXAMPLES]
    there = np.take_along_axis(shown, order, -1)
    return {
        name: np.where(there, np.take_along_axis(both[name], order, -1), fill).astype(dtype)
        for name, (dtype, fill) in FEATURE_FIELDS.items()
    }


def _of_unit(run: Any, path: str, unit: int) -> np.ndarray:
    with reading(run.storage, path):
        return shards.read(run.group[path], run.checked, path, unit, unit + 1, 0)[0]


def problems(
    about: FeatureLists, values: Mapping[str, np.ndarray], tokens: Mapping[str, Int[np.ndarray, " token"]]
) -> Iterator[str]:
    """Yield what is wrong with the lists [channel feature example] of a unit, which have the names of the store.

    tokens: `sequence`, `position` and `channel` of the unit's tokens, ascending.
    """
    token = tokens["sequence"].astype(np.int64) << 32 | tokens["position"].astype(np.int64)
    count = values[f"features/{about.hook}_count"]
    for kind in EXAMPLE_KINDS:
        name = f"features/{about.hook}_{kind}"
        activation, sequence, position = (values[f"{name}_{field}"] for field in FEATURE_FIELDS)
        filled = sequence >= 0
        wanted = sequence[filled].astype(np.int64) << 32 | position[filled].astype(np.int64)
        row = np.minimum(np.searchsorted(token, wanted), len(token) - 1)
        if (token[row] != wanted).any():
            yield f"{name}_position names a token that is not in the unit"
        elif (tokens["channel"][row] != np.nonzero(filled)[0]).any():
            yield f"{name}_position names a token of another channel"
        if not (np.isfinite(activation).all() and (activation[filled] > 0).all()):
            yield f"{name}_activation is not above 0 and finite"
        if (filled.sum(-1) != np.minimum(count, N_FEATURE_EXAMPLES)).any():
            yield f"{name}_sequence has not as many tokens as the feature's count allows"
    if (np.diff(values[f"features/{about.hook}_top_activation"], axis=-1) > 0).any():
        yield f"features/{about.hook}_top_activation does not descend"
