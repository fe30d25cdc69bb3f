"""The sufficient statistics of a unit by sequence and channel, which studies resample instead of tokens.

Sums over the tokens of each (sequence, channel); channels are those of `workbench.harmony.labels.CHANNELS`, which
partition the tokens, so that summing over channels gives the sequence.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Num

from workbench.harmony.labels import CHANNELS


def summarise(
    records: Mapping[str, np.ndarray],
    sequence: Int[np.ndarray, " token"],
    channel: Int[np.ndarray, " token"],
    *,
    num_experts: int,
) -> dict[str, np.ndarray]:
    """Return all sums of records [layer token ...] by sequence (ascending) and channel."""
    _, row = np.unique(sequence, return_inverse=True)
    n_rows, n_channels = int(row.max()) + 1, len(CHANNELS)
    cell = row * n_channels + channel
    n_cells = n_rows * n_channels

    def shaped(values: np.ndarray) -> np.ndarray:
        return values.reshape(n_rows, n_channels, *values.shape[1:])

    sums = {"tokens": shaped(np.bincount(cell, minlength=n_cells).astype(np.uint32))}
    if "experts" in records:
        experts = records["experts"].astype(np.int64)
        sums["expert_count"] = shaped(_count(experts, cell, n_cells, num_experts).astype(np.uint32))
        gates = records["gates"].astype(np.float64)
        sums["gate_sum"] = shaped(_count(experts, cell, n_cells, num_experts, gates).astype(np.float32))
        sums["coactivation"] = expert_pairs(experts, experts, channel, num_experts)
        sums["transition"] = expert_pairs(experts[:-1], experts[1:], channel, num_experts)
    if "sink" in records:
        sink = records["sink"].astype(np.float64)
        sums["sink_sum"] = shaped(_sum(sink, cell, n_cells).astype(np.float32))
        sums["sink_sumsq"] = shaped(_sum(sink**2, cell, n_cells).astype(np.float32))
    for name, values in records.items():
        if name.startswith("selected/"):
            counts = np.bincount(cell[values], minlength=n_cells).astype(np.uint32)
            sums[name.removeprefix("selected/") + "_tokens"] = shaped(counts)
        if name.startswith("activations/"):
            wide = float32_of(values).astype(np.float64)
            sums[name.removeprefix("activations/") + "_sum"] = shaped(_sum(wide, cell, n_cells).astype(np.float32))
        if name.startswith("records/") and values.dtype.kind == "f":
            flat = values.astype(np.float64).reshape(*values.shape[:2], -1)
            total = _sum(flat, cell, n_cells).astype(np.float32)
            total = total.reshape(n_cells, len(values), *values.shape[2:])
            sums[name.removeprefix("records/") + "_sum"] = shaped(total)
    return sums


def float32_of(bits: Int[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """Return float32 of bfloat16 values that are stored as their 16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _count(
    experts: Int[np.ndarray, "layer token slot"],
    cell: Int[np.ndarray, " token"],
    n_cells: int,
    num_experts: int,
    weights: Num[np.ndarray, "layer token slot"] | None = None,
) -> Num[np.ndarray, "cell layer expert"]:
    """Selections of each expert by the tokens of each cell, or their summed weights."""
    out = np.empty((n_cells, len(experts), num_experts))
    for layer, chosen in enumerate(experts):
        flat = (cell[:, None] * num_experts + chosen).ravel()
        w = None if weights is None else weights[layer].ravel()
        out[:, layer] = np.bincount(flat, w, n_cells * num_experts).reshape(n_cells, num_experts)
    return out


def expert_pairs(
    first: Int[np.ndarray, "layer token slot"],
    second: Int[np.ndarray, "layer token slot"],
    channel: Int[np.ndarray, " token"],
    num_experts: int,
) -> Num[np.ndarray, "channel layer expert expert"]:
    """Return tokens that went to expert i in `first` and to expert j in `second`."""
    out = np.empty((len(CHANNELS), len(first), num_experts, num_experts), dtype=np.uint32)
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        pair = (channel[:, None, None] * num_experts + a[:, :, None]) * num_experts + b[:, None, :]
        counts = np.bincount(pair.ravel(), minlength=len(CHANNELS) * num_experts**2)
        out[:, layer] = counts.reshape(len(CHANNELS), num_experts, num_experts)
    return out


def _sum(
    values: Num[np.ndarray, "layer token d"], cell: Int[np.ndarray, " token"], n_cells: int
) -> Num[np.ndarray, "cell layer d"]:
    """Return sums over the tokens of each cell."""
    order = np.argsort(cell, kind="stable")
    used, starts = np.unique(cell[order], return_index=True)
    out = np.zeros((n_cells, values.shape[0], values.shape[2]))
    out[used] = np.add.reduceat(values[:, order], starts, axis=1).swapaxes(0, 1)
    return out
