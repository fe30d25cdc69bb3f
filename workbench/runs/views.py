"""Recorded quantities as labelled arrays: every layer, head and expert at its own number, NaN where none was recorded.

A capture may record some layers of one quantity and other layers of another. In the dataset they share the dimensions
`layer`, `head`, `kv`, `slot` and `expert`, each as long as in the model, so `dataset["hook_resid_post"].sel(layer=3)`
means layer 3. What was not recorded is NaN (−1 for expert numbers); it takes memory only where it is computed.
"""

from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, PARTS, ROLES
from workbench.runs.schema import Activation, Record
from workbench.runs.summaries import float32_of

_SIZES = {
    "layer": "n_layers",
    "head": "n_heads",
    "kv": "n_key_value_heads",
    "slot": "experts_per_token",
    "expert": "num_experts",
}
LABELS = ("sequence", "position", "message", "part", "role", "channel")  # coordinates of the tokens
# what codes of a label mean, from 0; −1 is not a role
CODES = {"part": PARTS, "role": ROLES, "channel": CHANNELS}
_OF_SEQUENCES = ("effort", "task")
# Python strings: the metadata lets xarray write them to netCDF and Zarr without reading all of them first
_TEXT = np.dtype(object, metadata={"element_type": str})
# Long name and, where it has one, unit of what a dataset holds, as plots with xarray show them.
_ABOUT = {
    "layer": ("layer", ""),
    "slot": ("slot, by router logit", ""),
    "head": ("head", ""),
    "kv": ("key-value head", ""),
    "expert": ("expert", ""),
    "sequence": ("sequence", ""),
    "position": ("position in the sequence", "tokens"),
    "message": ("message of the sequence", ""),
    "part": ("part", ""),
    "role": ("role", ""),
    "channel": ("channel", ""),
    "part_name": ("part", ""),
    "role_name": ("role", ""),
    "channel_name": ("channel", ""),
    "effort": ("reasoning effort", ""),
    "task": ("task", ""),
    "prompt_id": ("prompt", ""),
    "id": ("token id", ""),
    "is_prompt": ("token of the prompt", ""),
    "logprob": ("log-probability of the token", "nat"),
    "entropy": ("entropy of the prediction of the token", "nat"),
    "experts": ("chosen expert", ""),
    "gates": ("gate weight", ""),
    "router_logits": ("router logit", "logit"),
    "own_experts": ("expert that the model's router chose", ""),
    "router_margin": ("margin of the model's router", "logit"),
    "forced": ("token whose experts the host chose", ""),
    "sink": ("sink attention", ""),
}
Variable = tuple[tuple[str, ...], da.Array, dict[str, Any]]


def recorded(
    lazy: da.Array, about: Activation | Record, model: Mapping[str, Any], selected: da.Array | None
) -> Variable:
    """Return a stored quantity [layer, token, …] as a variable of the dataset. selected: which tokens have values."""
    attrs: dict[str, Any] = {"hook": about.hook, "reduce": about.reduce, "long_name": about.name}
    if isinstance(about, Activation):
        lazy, attrs = lazy.map_blocks(float32_of, dtype=np.float32), attrs | {"stored_dtype": "bfloat16"}
        dims = about.dims or ("feature",)
        if len(dims) > 1:
            first = len(about.index) or int(model[_SIZES[dims[0]]])
            lazy = lazy.reshape((*lazy.shape[:2], first, about.d // first))
        index_dim = dims[0]
    else:
        dims, index_dim = about.dims, about.index_dim
        attrs |= {k: v for k, v in (("long_name", about.description), ("units", about.unit)) if v}
    if lazy.dtype.kind == "u":
        lazy = lazy.astype(np.int16)
    lazy, attrs = in_float32(lazy, attrs)
    fill = lazy.dtype.type(-1 if lazy.dtype.kind == "i" else np.nan)
    if selected is not None:
        lazy = da.where(selected.reshape((1, -1, *(1,) * len(dims))), lazy, fill)
    if about.index and index_dim in dims:
        lazy = _spread(lazy, 2 + dims.index(index_dim), about.index, int(model[_SIZES[index_dim]]), fill)
    lazy = _all_layers(lazy, about.layers, int(model["n_layers"]), fill)
    return ("layer", "token", *dims), lazy, attrs


def in_float32(lazy: da.Array, attrs: dict[str, Any]) -> tuple[da.Array, dict[str, Any]]:
    """Return float16 values as float32, with the stored dtype among the attributes.

    Sums and means over tokens would otherwise be added up in float16, which holds 11 bits and nothing above 65,504.
    """
    if lazy.dtype != np.float16:
        return lazy, attrs
    return lazy.astype(np.float32), attrs | {"stored_dtype": "float16"}


def labels_of(name: str) -> dict[str, str]:
    """Return CF attributes of a variable or coordinate, which plots show: `long_name` and, if it has one, `units`."""
    long_name, units = _ABOUT.get(name, ("", ""))
    return {key: text for key, text in (("long_name", long_name), ("units", units)) if text}


def flags(name: str) -> dict[str, Any]:
    """Return CF attributes that name the codes of a label: `flag_values` and `flag_meanings`."""
    if name not in CODES:
        return {}
    return {"flag_values": list(range(len(CODES[name]))), "flag_meanings": " ".join(CODES[name])}


def names(labels: Mapping[str, Variable], sequences: pd.DataFrame) -> dict[str, Variable]:
    """Return labels of tokens as text: `channel_name`, `role_name`, `part_name`, `effort`, `task`, `prompt_id`; lazily.

    They are Python strings, one for all tokens of a label, so that they take 8 bytes a token however long they are.
    """
    variables: dict[str, Variable] = {}
    for name, known in CODES.items():
        if name in labels:
            dims, codes, _ = labels[name]
            variables[f"{name}_name"] = (
                dims,
                _looked_up(codes, np.array([*known, ""], dtype=_TEXT)),
                labels_of(f"{name}_name"),
            )
    dims, owner, _ = labels["sequence"]
    size = int(sequences.index.max()) + 2 if len(sequences) else 1
    for name in (*_OF_SEQUENCES, "prompt_id"):
        values = np.full(size, "", dtype=_TEXT)
        values[sequences.index] = sequences[name].astype(str)
        variables[name] = (dims, _looked_up(owner, values), labels_of(name))
    return variables


def _looked_up(codes: da.Array, values: np.ndarray) -> da.Array:
    """Return the value of each code; −1 has the last."""
    return codes.map_blocks(_look_up, values=values, dtype=values.dtype)


def _look_up(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values[codes.astype(np.int64)]


def chosen(run: Any, labels: Mapping[str, Any]) -> np.ndarray:
    """Return which visible tokens [token] have these labels.

    Raises:
        InputError: a label or a name is unknown.
    """
    data, table = run.dataset, run.sequences
    mask = np.ones(data.sizes["token"], dtype=bool)
    for name, given in labels.items():
        wanted = [given] if isinstance(given, str | int) else list(given)
        of_sequence = {"sequence": "id"}.get(name, name)
        known: Any = CODES.get(name)
        if known is None and (name in CODES or of_sequence not in table):
            labels_known = (*CODES, *_OF_SEQUENCES, "domain", "prompt_id", "correct", "sequence")
            raise InputError(f"{name!r} is not a label of a run's tokens: use {', '.join(labels_known)}")
        known = list(dict.fromkeys(table[of_sequence])) if known is None else known
        if unknown := [w for w in wanted if w not in known]:
            raise InputError(f"{name}={unknown[0]!r}: the run has {', '.join(map(str, known[:12]))}")
        if name in CODES:
            mask &= np.isin(data[name].values, [known.index(w) for w in wanted])
        else:
            numbers = table.index[table[of_sequence].isin(wanted)]
            mask &= np.isin(data["sequence"].values, numbers)
    return mask


def summary_dims(about: Activation | Record, stored: tuple[str, ...]) -> tuple[str, ...]:
    """Return names for the dimensions of a summary after the layer, without what of them was recorded."""
    if isinstance(about, Record):
        return about.dims
    own = "_".join(about.dims or ("feature",))
    return (own, *("sketch" for _ in stored[1:]))


def coordinates(variables: Mapping[str, Variable], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers for the dimensions that number something of the model."""
    used = {dim for dims, _, _ in variables.values() for dim in dims} | {"layer"}
    return {dim: (dim, np.arange(int(model[size])), labels_of(dim)) for dim, size in _SIZES.items() if dim in used}


def _spread(lazy: da.Array, axis: int, index: tuple[int, ...], size: int, fill: Any) -> da.Array:
    """Return the array with its entries of an axis at their numbers among `size`, the others filled."""

    lazy = lazy.rechunk({axis: -1})
    chunks = (*lazy.chunks[:axis], (size,), *lazy.chunks[axis + 1 :])
    return lazy.map_blocks(_put, axis, index, size, fill, dtype=lazy.dtype, chunks=chunks)


def _put(block: np.ndarray, axis: int, index: tuple[int, ...], size: int, fill: Any) -> np.ndarray:
    out = np.full((*block.shape[:axis], size, *block.shape[axis + 1 :]), fill, dtype=block.dtype)
    np.moveaxis(out, axis, 0)[list(index)] = np.moveaxis(block, axis, 0)
    return out


def _all_layers(lazy: da.Array, layers: tuple[int, ...], n_layers: int, fill: Any) -> da.Array:
    """Return the array with every layer of the model at its number, those that were not recorded filled."""
    if layers == tuple(range(n_layers)):
        return lazy
    missing = da.full(lazy.shape[1:], fill, dtype=lazy.dtype, chunks=lazy.chunks[1:])
    rows = {layer: lazy[i] for i, layer in enumerate(layers)}
    return da.stack([rows.get(layer, missing) for layer in range(n_layers)])
