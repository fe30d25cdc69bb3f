"""Models whose layers have different numbers of experts, such as pruned ones: which cells (layer × expert) exist.

The expert axis of a run is as long as in the layer with the most experts. A cell beyond a layer's own number stands for
no expert: sums hold zero there, and the results of studies NaN, which figures draw as missing.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

# Axes of layers and of experts in results; expert_2 of a pair of layers is in the second.
_AXES = (("layer", "expert", 0), ("layer", "expert_2", 0), ("layer_pair", "expert", 0), ("layer_pair", "expert_2", 1))


def layer_experts(run: Any, n_layers: int, num_experts: int) -> Int[np.ndarray, " layer"]:
    """Return the number of experts of each layer; `num_experts` where the run's model does not say otherwise."""
    own = (getattr(run, "model", None) or {}).get("layer_experts")
    return np.full(n_layers, num_experts) if own is None else np.asarray(own)


def mask_absent(result: xr.Dataset, run: Any) -> xr.Dataset:
    """Return the dataset with NaN in the numbers of cells (layer × expert) that stand for no expert."""
    if (getattr(run, "model", None) or {}).get("layer_experts") is None:
        return result
    own = layer_experts(run, 0, 0)
    masked = result.copy()
    for name, variable in result.data_vars.items():
        if variable.dtype.kind == "f":
            exists = xr.DataArray(True)
            for layer, expert, later in _AXES:
                if {layer, expert} <= set(variable.dims):
                    exists = exists & _exists(result, own, layer, expert, later)
            masked[name] = variable.where(exists).transpose(*variable.dims).assign_attrs(variable.attrs)
    return masked


def _exists(result: xr.Dataset, own: np.ndarray, layer: str, expert: str, later: int) -> xr.DataArray:
    """Return whether an expert of this number is in the layer, or in the one `later` layers after it."""
    layers, experts = (np.asarray(result[name].values) for name in (layer, expert))
    return xr.DataArray(experts[None, :] < own[layers + later][:, None], dims=(layer, expert))
