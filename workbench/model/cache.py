"""The key-value cache: what every layer has seen, a row of the batch each, filled to its own length.

A key lives at the index of its position. So rows of unequal length need no mask: what lies beyond a row's
length is later than any of its queries, and is overwritten when the row gets there.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.model.config import Config


class KVCache:
    """Keys and values of `batch` rows, up to `capacity` positions each; layers on one device, or on one each."""

    def __init__(
        self,
        cfg: Config,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        devices = [device] * cfg.n_layers if isinstance(device, torch.device) else device
        shape = (batch, capacity, cfg.n_key_value_heads, cfg.d_head)
        self.keys = [torch.zeros(shape, dtype=dtype, device=d) for d in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=d) for d in devices]
        self.lengths: Int[Tensor, " batch"] = torch.zeros(batch, dtype=torch.long, device=devices[0])
        self.tokens: Int[Tensor, "batch capacity"] = torch.zeros(shape[:2], dtype=torch.long)
        self.rows: Int[Tensor, " batch"] = torch.arange(batch)  # which row of the first batch each is

    def note(self, tokens: Int[Tensor, "batch new"]) -> None:
        """Write down which tokens are about to come, behind each row's length: token sets are read off them."""
        lengths = self.lengths.cpu()
        end = int(lengths.max()) + tokens.shape[1]
        if end > self.tokens.shape[1]:
            raise ValueError(f"the cache holds {self.tokens.shape[1]} positions, {end} are needed: make it larger")
        cols = lengths[:, None] + torch.arange(tokens.shape[1])
        self.tokens[torch.arange(len(lengths))[:, None], cols] = tokens.cpu()

    def extend(
        self, layer: int, k: Float[Tensor, "batch new kv d_head"], v: Float[Tensor, "batch new kv d_head"]
    ) -> tuple[Float[Tensor, "batch key kv d_head"], Float[Tensor, "batch key kv d_head"]]:
        """Write behind each row's length (which `advance` moves, after the last layer) and return all keys so far."""
        keys, values, lengths = self.keys[layer], self.values[layer], self.lengths.to(k.device)
        end = int(lengths.max()) + k.shape[1]
        rows = torch.arange(len(lengths), device=k.device)[:, None]
        cols = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        keys[rows, cols], values[rows, cols] = k, v
        return keys[:, :end], values[:, :end]

    def advance(self, n: int) -> None:
        """Count `n` more positions in every row."""
        self.lengths += n

    def truncate(self, lengths: Int[Tensor, " batch"]) -> None:
        """Forget what lies beyond these lengths (padding, or a continuation to be tried again)."""
        self.lengths = lengths.to(self.lengths.device, copy=True)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows only; a layer at a time, so that no two caches are held."""
        for held in (self.keys, self.values):
            for layer, tensor in enumerate(held):
                held[layer] = tensor[rows.to(tensor.device)]
        self.lengths = self.lengths[rows.to(self.lengths.device)]
        self.tokens, self.rows = self.tokens[rows.cpu()], self.rows[rows.cpu()]
