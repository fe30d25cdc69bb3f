"""The key-value cache: keys and values of the tokens so far, a row of the batch each, filled to its own length.

A layer without a window holds every position. A layer with one holds its window and `SLACK` positions more: of each row
the positions from its *base* on, which moves forward when a row has no room left. In what a layer holds, a key lies at
its position minus its row's base. So rows of unequal length need no mask: what lies beyond a row's length is later than
any of its queries, and is overwritten when the row gets there. Bases are multiples of `ALIGNMENT`, so that kernels that
read keys in blocks read the same blocks as from a cache that holds everything, and round the same.

Lengths and bases are counted on the host, and beside it on every device that needs them. A pass therefore copies
nothing between the host and a device on their behalf.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.model.config import Config

ALIGNMENT = 64  # positions; a multiple of every kernel's block of keys
BACK = 32  # positions that a row can always be truncated by
SLACK = 192  # positions held beyond the window: BACK, up to ALIGNMENT - 1 by rounding, and 98 to write before a move


class CachedKeys(NamedTuple):
    """What one layer attends to in a pass.

    positions: of the pass's tokens among these keys. base: of every row the position of its first key, which is 0 in
    all rows if None.
    """

    keys: Float[Tensor, "batch key kv d_head"]
    values: Float[Tensor, "batch key kv d_head"]
    positions: Int[Tensor, "batch new"]
    base: Int[Tensor, " batch"] | None


@dataclass
class _Held:
    """What the layers of one window hold: `size` positions of every row, from its base on. `bases` are on the host."""

    window: int | None
    size: int
    bases: list[int]
    base: dict[torch.device, Tensor]

    @property
    def moves(self) -> bool:
        """Return whether the bases ever move."""
        return self.window is not None

    def oldest(self, length: int) -> int:
        """Return the position from which a row of this length has to be held, without the reserve for `truncate`."""
        return 0 if self.window is None else max(0, length - self.window + 1)

    def base_for(self, length: int) -> int:
        """Return the base of a row of this length after a move."""
        return max(0, self.oldest(length) - BACK) // ALIGNMENT * ALIGNMENT

    def base_on_device(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the same as `base_for`, on the device of `lengths`."""
        assert self.window is not None
        return (lengths - (self.window - 1 + BACK)).clamp(min=0) // ALIGNMENT * ALIGNMENT


class _Longer(NamedTuple):
    """Columns of a pass that attends to more than its layers hold: of every row the position of its first key, what it
    takes of the stored keys, where its own keys are appended to those, and which of all it stores.
    """

    base: Int[Tensor, " batch"]
    before: Int[Tensor, "batch before"]
    columns: Int[Tensor, "batch new"]
    retained: Int[Tensor, "batch retained"]


@dataclass
class _Pass:
    """A pass that has begun: its tokens a row, how many of them are real, and what its layers share on each device."""

    new: int
    n_real: list[int]
    longer: set[int | None]  # windows whose layers cannot hold what this pass attends to
    done: set[int] = field(default_factory=set)  # layers that have stored their keys
    columns: dict[tuple[int | None, torch.device], Tensor] = field(default_factory=dict)
    plans: dict[tuple[int | None, torch.device], _Longer] = field(default_factory=dict)


class KVCache:
    """Keys and values of `batch` rows, up to `capacity` positions each; layers on one device, or on one each.

    windowed: layers with a window hold only what it can reach. Otherwise every layer holds every position.
    """

    def __init__(
        self,
        cfg: Config,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
        windowed: bool = True,
    ) -> None:
        given = [device] * cfg.n_layers if isinstance(device, torch.device) else device
        devices = [torch.empty(0, device=d).device for d in given]  # "cuda" is the current GPU: "cuda:0"
        self.capacity, self._devices = capacity, devices
        windows = [w if windowed and held_positions(w, capacity) < capacity else None for w in cfg.windows]
        self._windows: list[int | None] = windows
        self._held = {
            window: _Held(window, held_positions(window, capacity), [0] * batch, _zeros(batch, devices))
            for window in dict.fromkeys(windows)
        }
        shape = (cfg.n_key_value_heads, cfg.d_head)
        sizes = [self._held[window].size for window in windows]
        pairs = list(zip(sizes, devices, strict=True))
        self.keys = [torch.zeros((batch, size, *shape), dtype=dtype, device=d) for size, d in pairs]
        self.values = [torch.zeros((batch, size, *shape), dtype=dtype, device=d) for size, d in pairs]
        self.tokens: Int[Tensor, "batch capacity"] = torch.zeros((batch, capacity), dtype=torch.long, device=devices[0])
        self.rows: Int[Tensor, " batch"] = torch.arange(batch)  # which row of the first batch each is, on the host
        self._lengths, self._length = [0] * batch, _zeros(batch, devices)
        self._index = {d: torch.arange(batch, device=d)[:, None] for d in self._length}  # of the rows
        self._pass: _Pass | None = None
        # For a graph, whose shapes cannot change: attend to this many positions, filled or not, or to the whole window.
        self.fixed_end: int | None = None

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Return how many positions each row has, as a new tensor on the host."""
        return torch.tensor(self._lengths)

    @property
    def host_lengths(self) -> list[int]:
        """Return how many positions each row has."""
        return list(self._lengths)

    def next_positions(self, new: int) -> Int[Tensor, "batch {new}"]:
        """Return the positions of the next `new` tokens of every row, on the device of the first layer."""
        device = self.tokens.device
        return self._length[device][:, None] + torch.arange(new, device=device)

    def begin(self, tokens: Int[Tensor, "batch new"], n_real: Sequence[int] | None = None) -> None:
        """Prepare a pass over these tokens, which follow each row's length, and record them for token sets.

        n_real: how many of each row's tokens are not padding on the right; the others are not kept.

        Raises:
            InputError: the cache is too small, or an earlier pass failed and left it incomplete.
        """
        self._refuse_unfinished()
        batch, new = tokens.shape
        if batch != len(self._lengths):
            raise InputError(f"{batch} rows of tokens for a cache of {len(self._lengths)} rows: pass one for each")
        end = max(self._lengths, default=0) + new
        if end > self.capacity:
            raise InputError(f"the cache holds {self.capacity} positions, {end} are needed: make it larger")
        longer = {held.window for held in self._held.values() if not self._make_room(held, new)}
        self._pass = _Pass(new, [new] * batch if n_real is None else list(n_real), longer)
        device = self.tokens.device
        self.tokens[self._index[device], self.next_positions(new)] = tokens.to(device)

    def extend(
        self, layer: int, k: Float[Tensor, "batch new kv d_head"], v: Float[Tensor, "batch new kv d_head"]
    ) -> CachedKeys:
        """Store the keys and values of the pass that has begun, and return all that this layer attends to."""
        reserved = self.reserve(layer)
        held = self._held[self._windows[layer]]
        if reserved is None:
            return self._extend_longer(layer, held, k, v)
        keys, values, columns, base = reserved
        index = self._index[k.device]
        keys[index, columns], values[index, columns] = k, v
        filled = max(length - start for length, start in zip(self._lengths, held.bases, strict=True)) + k.shape[1]
        end = filled if self.fixed_end is None else held.size if held.moves else min(self.fixed_end, held.size)
        return CachedKeys(keys[:, :end], values[:, :end], columns, base)

    def reserve(self, layer: int) -> CachedKeys | None:
        """Return all keys and values that this layer holds; the caller must write those of the pass at `positions`.

        None: the layer cannot hold what the pass attends to, and `extend` is needed.
        """
        assert self._pass is not None, "a pass is prepared by begin"
        held = self._held[self._windows[layer]]
        self._pass.done.add(layer)
        if held.window in self._pass.longer:
            return None
        columns, device = self._columns(held, self._devices[layer]), self._devices[layer]
        return CachedKeys(self.keys[layer], self.values[layer], columns, held.base[device] if held.moves else None)

    def advance(self, n: int | Sequence[int] | None = None) -> None:
        """Count `n` more positions in every row, or in each row its own number; None: the real tokens of the pass."""
        counts = [n] * len(self._lengths) if isinstance(n, int) else n
        if counts is None:
            assert self._pass is not None, "advance comes after begin"
            counts = self._pass.n_real
        self._finish_longer()
        if len(set(counts)) == 1:
            for length in self._length.values():
                length.add_(counts[0])
        else:
            for device, length in self._length.items():
                length.add_(torch.tensor(list(counts)).to(device, non_blocking=True))
        self.count(counts)

    def count(self, counts: Sequence[int]) -> None:
        """Count positions on the host alone, where the devices have counted them already (a replayed graph)."""
        self._lengths = [length + n for length, n in zip(self._lengths, counts, strict=True)]
        self._pass = None

    def make_room(self, new: int) -> None:
        """Move what windowed layers hold, where it has to be moved before `new` positions are written."""
        for held in self._held.values():
            self._make_room(held, new)

    def truncate(self, lengths: Int[Tensor, " batch"] | Sequence[int]) -> None:
        """Forget what lies beyond these lengths (padding, or a continuation to be tried again).

        Raises:
            InputError: a row has fewer positions, or a windowed layer no longer holds what its window reaches from
                there; the last `BACK` positions can always be forgotten.
        """
        self._refuse_unfinished()
        wanted = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(wanted) != len(self._lengths):
            raise InputError(f"{len(wanted)} lengths for a cache of {len(self._lengths)} rows: pass one for each row")
        for row, (now, length) in enumerate(zip(self._lengths, wanted, strict=True)):
            if not 0 <= length <= now:
                raise InputError(f"row {row} has {now} positions and cannot be truncated to {length}")
            for held in self._held.values():
                if held.oldest(length) < held.bases[row]:
                    raise InputError(
                        f"row {row} has {now} positions and cannot be truncated to {length}: layers with a window of "
                        f"{held.window} hold positions from {held.bases[row]} only; run the row again with a new "
                        "cache, or make the cache with windowed=False"
                    )
        self._lengths, self._pass = wanted, None
        for counted in self._length.values():
            counted.copy_(self.lengths)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows only; a layer at a time, so that no two caches are held."""
        for stored in (self.keys, self.values):
            for layer, tensor in enumerate(stored):
                stored[layer] = tensor[rows.to(tensor.device)]
        chosen: list[int] = rows.tolist()
        self._lengths = [self._lengths[row] for row in chosen]
        self._length = {device: length[rows.to(device)] for device, length in self._length.items()}
        self._index = {device: torch.arange(len(chosen), device=device)[:, None] for device in self._length}
        for held in self._held.values():
            held.bases = [held.bases[row] for row in chosen]
            held.base = {device: base[rows.to(device)] for device, base in held.base.items()}
        self.tokens, self.rows = self.tokens[rows.to(self.tokens.device)], self.rows[rows.cpu()]
        self._pass = None

    def _refuse_unfinished(self) -> None:
        """Raise an InputError if a pass ended half-way after some layers had already let go of earlier keys."""
        if self._pass is not None and self._pass.longer and any(self._lengths):
            raise InputError("an earlier pass with this cache raised an error half-way: continue with a new cache")

    def _columns(self, held: _Held, device: torch.device) -> Int[Tensor, "batch new"]:
        """Return the indices of the pass's tokens among the keys of these layers, computed once a pass and device."""
        assert self._pass is not None
        key = (held.window, device)
        if key not in self._pass.columns:
            first = self._length[device] - held.base[device] if held.moves else self._length[device]
            self._pass.columns[key] = first[:, None] + torch.arange(self._pass.new, device=device)
        return self._pass.columns[key]

    def _make_room(self, held: _Held, new: int) -> bool:
        """Move the bases of these layers if `new` positions need it; return whether they then have room."""

        def free(bases: Sequence[int]) -> int:
            return held.size - max((n - base for n, base in zip(self._lengths, bases, strict=True)), default=0)

        if free(held.bases) >= new:
            return True
        moved = [max(base, held.base_for(n)) for base, n in zip(held.bases, self._lengths, strict=True)]
        if free(moved) < new:
            return False
        retained = held.size - free(moved)
        for device, base in held.base.items():
            shift = (held.base_on_device(self._length[device]) - base).clamp(min=0)
            columns = _shifted(shift, retained, held.size)
            for layer in self._layers(held, device):
                for stored in (self.keys[layer], self.values[layer]):
                    stored[:, :retained] = stored[self._index[device], columns]
            base.add_(shift)
        held.bases = moved
        return True

    def _extend_longer(self, layer: int, held: _Held, k: Tensor, v: Tensor) -> CachedKeys:
        """Attend to more than the layer can hold, and store the end of it."""
        index, plan = self._index[k.device], self._longer(held, k.device)
        keys, values = k, v
        if plan.before.shape[1]:
            keys, values = (
                torch.cat([stored[index, plan.before], torch.zeros_like(part)], 1)
                for stored, part in ((self.keys[layer], k), (self.values[layer], v))
            )
            keys[index, plan.columns], values[index, plan.columns] = k, v
        retained = plan.retained.shape[1]
        self.keys[layer][:, :retained], self.values[layer][:, :retained] = (
            keys[index, plan.retained],
            values[index, plan.retained],
        )
        return CachedKeys(keys, values, plan.columns, plan.base)

    def _longer(self, held: _Held, device: torch.device) -> _Longer:
        """Return the columns of `_extend_longer`; computed once a pass and device."""
        assert self._pass is not None
        key = (held.window, device)
        if key not in self._pass.plans:
            lengths, stored = self._length[device], held.base[device]
            first = [max(b, held.base_for(n)) for b, n in zip(held.bases, self._lengths, strict=True)]
            before = max(n - b for n, b in zip(self._lengths, first, strict=True))
            base = torch.maximum(stored, held.base_on_device(lengths))
            columns = (lengths - base)[:, None] + torch.arange(self._pass.new, device=device)
            ends = [n + real for n, real in zip(self._lengths, self._pass.n_real, strict=True)]
            retained = max(n - max(b, held.base_for(n)) for n, b in zip(ends, first, strict=True))
            last = torch.maximum(base, held.base_on_device(lengths + self._real(device))) - base
            self._pass.plans[key] = _Longer(
                base,
                _shifted(base - stored, before, held.size),
                columns,
                _shifted(last, retained, before + self._pass.new),
            )
        return self._pass.plans[key]

    def _finish_longer(self) -> None:
        """Move the bases of layers that could not hold the pass, whose stored keys have moved already."""
        if self._pass is None:
            return
        for window in self._pass.longer:
            held = self._held[window]
            for device in held.base:
                for layer in self._layers(held, device):
                    if layer not in self._pass.done:  # the pass left this layer out: its new keys are zero
                        stored = self.keys[layer]
                        zeros = stored.new_zeros(len(stored), self._pass.new, *stored.shape[2:])
                        self._extend_longer(layer, held, zeros, zeros)
            for device, base in held.base.items():
                base.copy_(torch.maximum(base, held.base_on_device(self._length[device] + self._real(device))))
            ends = [n + real for n, real in zip(self._lengths, self._pass.n_real, strict=True)]
            held.bases = [max(base, held.base_for(n)) for base, n in zip(held.bases, ends, strict=True)]

    def _real(self, device: torch.device) -> Tensor | int:
        assert self._pass is not None
        counts = self._pass.n_real
        return counts[0] if len(set(counts)) == 1 else torch.tensor(counts).to(device, non_blocking=True)

    def _layers(self, held: _Held, device: torch.device) -> list[int]:
        layers = zip(self._windows, self._devices, strict=True)
        return [layer for layer, (window, d) in enumerate(layers) if window == held.window and d == device]


def held_positions(window: int | None, capacity: int) -> int:
    """Return how many positions a layer of this window holds in a cache of this capacity."""
    return capacity if window is None else min(capacity, window + SLACK)


def by_position(
    stored: Float[Tensor, "batch key kv d_head"], base: Int[Tensor, " batch"], n: int
) -> Float[Tensor, "batch {n} kv d_head"]:
    """Return keys or values at their own positions 0 to n − 1; those that are no longer held are zero."""
    index = torch.arange(n, device=stored.device) - base[:, None]
    held = (index >= 0) & (index < stored.shape[1])
    rows = torch.arange(len(stored), device=stored.device)[:, None]
    return torch.where(held[..., None, None], stored[rows, index.clamp(0, stored.shape[1] - 1)], 0)


def _zeros(batch: int, devices: Sequence[torch.device]) -> dict[torch.device, Tensor]:
    return {d: torch.zeros(batch, dtype=torch.long, device=d) for d in dict.fromkeys(devices)}


def _shifted(by: Int[Tensor, " batch"], n: int, size: int) -> Int[Tensor, "batch {n}"]:
    """Return the columns `by` to `by + n - 1` of every row, none beyond the last of `size`."""
    return (by[:, None] + torch.arange(n, device=by.device)).clamp(max=size - 1)
