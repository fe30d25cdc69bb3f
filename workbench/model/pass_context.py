"""The context of one forward pass: the sequence, position and rotation of each token, and the keys before it.

A pass sees sequences in one of three ways: a padded batch, sequences packed end to end in one row, or the next tokens
of sequences whose beginnings a cache holds. Hooks need not care: `sequence` and `positions` state what every token is,
`mask` which tokens of the pass are in a token set, `key_mask` which keys. These and `sequence` lie on the CPU.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.edits import EVERY_TOKEN, TokenSet
from workbench.kernels import attention as attend
from workbench.model.cache import CachedKeys, KVCache, by_position
from workbench.model.config import Config
from workbench.model.rope import cos_sin


class PassContext:
    """What `model.context` is during a pass. `sequence` is −1 for padding."""

    def __init__(
        self,
        cfg: Config,
        tokens: Int[Tensor, "batch pos"],
        cache: KVCache | None = None,
        packed: Sequence[int] | None = None,
        n_real: Sequence[int] | None = None,
        frequencies: Float[Tensor, " half"] | None = None,
    ) -> None:
        """Describe a pass over `tokens`, and prepare its cache. frequencies: of the rotation, on the tokens' device.

        Raises:
            InputError: there are more tokens than the context of the model has.
        """
        self.cache, self.lengths = cache, list(packed) if packed is not None else None
        self._past = [] if cache is None else cache.host_lengths
        self._width = max(self._past, default=0) + tokens.shape[1] if packed is None else max(packed, default=0)
        if self._width > cfg.n_ctx:
            raise InputError(f"{self._width} tokens are more than the model's context of {cfg.n_ctx}")
        self.positions: Int[Tensor, "batch pos"] = self._positions(tokens)
        self.cos, self.sin = cos_sin(cfg.rope, cfg.d_head, self.positions, frequencies)
        self._rows = None if cache is None else cache.rows
        self._tokens, self._n_real = tokens, list(n_real or [tokens.shape[1]] * len(tokens))
        self._columns: Tensor | None = None
        self._inside: dict[TokenSet, dict[int, np.ndarray]] = {}
        self._masks: dict[TokenSet, Tensor] = {}
        self._among: tuple[PassContext, CachedKeys] | None = None
        if cache is not None:
            cache.begin(tokens, n_real)

    def _copy(self) -> "PassContext":
        """Return the same, to be changed: its masks are computed anew."""
        there = copy(self)
        there._masks = {}
        return there

    def to(self, device: torch.device) -> "PassContext":
        """Return the same on another device; the cache is not moved, as its layers may be on several devices."""
        if self.positions.device == device:
            return self
        there = self._copy()
        there.positions, there.cos, there.sin = (t.to(device) for t in (self.positions, self.cos, self.sin))
        return there

    def at(self, columns: Int[Tensor, "batch kept"]) -> "PassContext":
        """Return the same for some of the tokens; it places hooks after the last block, where not every token goes."""
        there = self._copy()
        there.positions = self.positions.gather(1, columns.to(self.positions.device))
        there._columns = columns.cpu()
        return there

    def last_tokens(self) -> "PassContext":
        """Return the same for the last token of every row in the cache, after the pass."""
        assert self.cache is not None
        there, lengths = self._copy(), self.cache.host_lengths
        there.positions = self.cache.next_positions(1) - 1
        there._past, there._n_real, there._width = [n - 1 for n in lengths], [1] * len(lengths), max(lengths)
        there._tokens, there._inside = self.cache.tokens[:, :1], {}
        return there

    def among(self, cached: CachedKeys) -> "PassContext":
        """Return the same for a layer whose keys come from a cache: positions count from its first key."""
        there = self._copy()
        there.positions, there._among = cached.positions, (self, cached)
        return there

    def every_key(
        self, k: Float[Tensor, "batch key kv d_head"], v: Float[Tensor, "batch key kv d_head"]
    ) -> tuple[Float[Tensor, "batch every_key kv d_head"], Float[Tensor, "batch every_key kv d_head"], "PassContext"]:
        """Return keys and values at their own positions from 0 on, and the context whose positions count from 0.

        Keys that a cache no longer holds are zero; no query of the pass sees them.
        """
        if self._among is None:
            return k, v, self
        context, cached = self._among
        if cached.base is None:
            return k[:, : self._width], v[:, : self._width], context
        return by_position(k, cached.base, self._width), by_position(v, cached.base, self._width), context

    @property
    def sequence(self) -> Int[Tensor, "batch pos"]:
        """Return which of the call's sequences every token belongs to; made when a hook asks."""
        if self.lengths is not None:
            every = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))[None]
        else:
            batch, pos = self._tokens.shape
            numbers = torch.arange(batch) if self._rows is None else self._rows
            every = torch.where(torch.arange(pos) < torch.tensor(self._n_real)[:, None], numbers[:, None], -1)
        return every if self._columns is None else every.gather(1, self._columns)

    def mask(self, members: TokenSet) -> Bool[Tensor, "batch pos"]:
        """Return which tokens of this pass are in the set; padding never is."""
        if members not in self._masks:  # asked again by every layer that is edited
            self._masks[members] = self._mask(members)
        return self._masks[members].clone()

    def _mask(self, members: TokenSet) -> Bool[Tensor, "batch pos"]:
        if members is EVERY_TOKEN:
            return self.sequence >= 0
        inside = self._members(members)
        begins, end = torch.zeros(max(inside, default=0) + 1, dtype=torch.long), 0
        for sequence, part in inside.items():
            begins[sequence], end = end, end + len(part)
        flat = torch.from_numpy(np.concatenate([*inside.values(), np.zeros(1, dtype=bool)]))
        owner = self.sequence
        index = torch.where(owner >= 0, begins[owner.clamp(min=0)] + self.positions.cpu(), end)
        return flat[index]

    def key_mask(self, members: TokenSet) -> Bool[Tensor, "batch key"]:
        """Return which keys of this pass are in the set: its tokens, and with a cache all that came before them."""
        if self.cache is None:
            return self.mask(members)
        inside = self._members(members)
        out = torch.zeros(len(inside), self._width, dtype=torch.bool)
        for row, part in enumerate(inside.values()):
            out[row, : len(part)] = torch.from_numpy(part)
        return out

    def visible(self, n_query: int, n_key: int, window: int | None) -> Bool[Tensor, "batch query key"]:
        """Return the mask over all keys, block-diagonal when packed."""
        if self.lengths is None:
            return attend.visible(self.positions, torch.arange(n_key, device=self.positions.device), window)
        mask = torch.zeros(1, n_query, n_key, dtype=torch.bool, device=self.positions.device)
        for s in attend.spans(self.lengths):
            mask[:, s, s] = attend.visible(self.positions[:, s], self.positions[0, s], window)
        return mask

    def _positions(self, tokens: Tensor) -> Tensor:
        batch, pos = tokens.shape
        if self.lengths is None:
            if self.cache is not None:
                return self.cache.next_positions(pos).to(tokens.device)
            return torch.arange(pos, device=tokens.device).expand(batch, pos).contiguous()
        if self.cache is not None or batch != 1 or sum(self.lengths) != pos:
            raise InputError(
                f"packed sequences need one row that they fill, and no cache: got {batch} rows of {pos} tokens, "
                f"lengths that sum to {sum(self.lengths)}, {'a' if self.cache is not None else 'no'} cache"
            )
        return torch.cat([torch.arange(n) for n in self.lengths])[None].to(tokens.device, non_blocking=True)

    def _members(self, members: TokenSet) -> dict[int, np.ndarray]:
        """Of every sequence so far, in the order of the rows, which tokens are in the set; a set is asked once."""
        if members not in self._inside:
            self._inside[members] = {s: np.asarray(members(ids), dtype=bool) for s, ids in self._streams().items()}
        return self._inside[members]

    def _streams(self) -> dict[int, np.ndarray]:
        """Return the ids of every sequence from its beginning to the end of this pass."""
        now = self._tokens.cpu().numpy()
        if self.lengths is not None:
            return {i: part for i, part in enumerate(np.split(now[0], np.cumsum(self.lengths)[:-1]))}
        if self.cache is None or self._rows is None:
            return {row: now[row, :end] for row, end in enumerate(self._n_real)}
        past = self.cache.tokens.cpu().numpy()
        rows = zip(self._rows.tolist(), self._past, self._n_real, strict=True)
        return {sequence: past[row, : before + end] for row, (sequence, before, end) in enumerate(rows)}
