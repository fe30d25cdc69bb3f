"""The key-value cache: what every layer has seen, a row of the batch each, filled to its own length.

A key lives at the index of its position. So rows of unequal length need no mask: what lies beyond a row's
length is later than any of its queries, and is overwritten when the row gets there.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.model.config import Config


class KVCache:
    """Keys and values of `batch` rows, up to `capacity` positions each."""

    def __init__(self, cfg: Config, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (cfg.n_layers, batch, capacity, cfg.n_key_value_heads, cfg.d_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths: Int[Tensor, " batch"] = torch.zeros(batch, dtype=torch.long, device=device)

    def extend(
        self, layer: int, k: Float[Tensor, "batch new kv d_head"], v: Float[Tensor, "batch new kv d_head"]
    ) -> tuple[Float[Tensor, "batch key kv d_head"], Float[Tensor, "batch key kv d_head"]]:
        """Write behind each row's length (which `advance` moves, after the last layer) and return all keys so far."""
        end = int(self.lengths.max()) + k.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} are needed: make it larger")
        rows = torch.arange(len(self.lengths), device=k.device)[:, None]
        cols = self.lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        self.keys[layer, rows, cols], self.values[layer, rows, cols] = k, v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, n: int) -> None:
        """Count `n` more positions in every row."""
        self.lengths += n

    def truncate(self, lengths: Int[Tensor, " batch"]) -> None:
        """Forget what lies beyond these lengths (padding, or a continuation to be tried again)."""
        self.lengths = lengths.clone()

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows only."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]
