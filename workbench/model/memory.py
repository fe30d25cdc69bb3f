"""Estimate memory before it is allocated: bytes of weights, cache and records, and of a forward pass on a GPU.

Weights, cache and records are arithmetic on the config. Activations follow the lifetimes of the tensors in
`workbench.model.transformer` and `workbench.kernels.gpu`, stage by stage: the largest is the peak. A test counts the
bytes alive while these very launchers run, and holds the formulas to it. cuBLAS takes `CUBLAS_WORKSPACE` once beside
them, which an H100 showed. Not in any of them: the driver's context, and what an allocator rounds up. GB is 10^9 bytes,
GiB 2^30.
"""

import os
import re
from bisect import bisect
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate, combinations
from math import prod

import torch

from workbench.errors import InputError
from workbench.hooks.names import hook_points
from workbench.model.cache import held_positions
from workbench.model.config import Config
from workbench.model.names import shapes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
CUBLAS_WORKSPACE = 32 * 2**20  # bytes that PyTorch gives cuBLAS on Hopper and newer; 8 MiB before
_MOST = 2**40  # more tokens or rows than any memory holds


def part_of(name: str) -> str:
    """Return the part that a tensor is loaded with: embed, blocks.{l} or unembed, which the final norm goes with."""
    head, *rest = name.split(".")
    return f"{head}.{rest[0]}" if head == "blocks" else head.replace("ln_final", "unembed")


def weights(cfg: Config, experts: str = "mxfp4", dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Return bytes of each part as loaded, in the order in which a forward pass meets them."""
    parts: dict[str, int] = {}
    for name, shape in shapes(cfg, experts).items():
        element_bytes = 1 if name.endswith((".blocks", ".scales")) else dtype.itemsize
        parts[part_of(name)] = parts.get(part_of(name), 0) + prod(shape) * element_bytes
    order = ["embed", *(f"blocks.{layer}" for layer in range(cfg.n_layers)), "unembed"]
    return {part: parts[part] for part in order}


def cache(cfg: Config, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of keys and values of one position in all layers: what it takes until windows are full."""
    return cfg.n_layers * _cached_position(cfg, dtype)


def cache_row(cfg: Config, positions: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of keys and values of a row of this many positions, in all layers."""
    held = sum(held_positions(window, positions) for window in cfg.windows)
    return held * _cached_position(cfg, dtype)


def _cached_position(cfg: Config, dtype: torch.dtype) -> int:
    """Return bytes of the key and the value of one position in one layer."""
    return 2 * cfg.n_key_value_heads * cfg.d_head * dtype.itemsize


def records(cfg: Config, points: Mapping[str, torch.dtype]) -> int:
    """Return bytes that a recorder keeps of one token on the host, for these hook points and stored dtypes."""
    axes = hook_points(cfg.n_layers)
    return sum(width(cfg, axes[name]) * dtype.itemsize for name, dtype in points.items())


def width(cfg: Config, axes: str) -> int:
    """Return values a token has at a hook point of these axes, for each key where they name the keys."""
    sizes = {
        "head": cfg.n_heads,
        "kv": cfg.n_key_value_heads,
        "slot": cfg.experts_per_token,
        "expert": cfg.num_experts,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
    }
    return prod(sizes.get(axis, 1) for axis in axes.split())


def activations(
    cfg: Config,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    recorded: Collection[str] = (),
    logits: int = 0,
    predictions: int = 0,
) -> dict[str, int]:
    """Return stage → the most bytes alive during it, in a forward pass over `tokens` on the Triton path.

    recorded: the hook points that are hooked. logits: rows of them that are made at the end; predictions: rows of
    which a capture takes log-probabilities and entropies at a time.
    """
    n, k, size, wide = tokens, cfg.experts_per_token, dtype.itemsize, max(dtype.itemsize, 4)
    widened = wide if size < wide else 0  # a copy in float32, where the tensor is not that already
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    stream, per_head, values = n * cfg.d_model * size, n * cfg.n_heads * wide, n * (q + 2 * kv) * size
    hooked = {name.split(".", 2)[-1] for name in recorded}

    z = n * q * size
    attention = max(2 * per_head, stream)  # the log-sum-exp and the sink, then the output
    if "attn.hook_sink" in hooked:
        attention = max(3 * per_head, stream)  # the hook gets a copy of the sink
    if "attn.hook_result" in hooked:
        attention = max(attention, stream + 2 * cfg.n_heads * stream)  # itself, and in order for the recorder
    post, out = n * k * cfg.d_mlp * size, n * k * cfg.d_model * size
    experts = max(post + out, out + stream)
    if hooked & {"mlp.experts.hook_gate", "mlp.experts.hook_pre"}:
        experts = 5 * post + out + stream  # gate and up as computed, and as the taps returned them
    elif hooked & {"mlp.experts.hook_post", "mlp.experts.hook_out"}:
        experts = post + out + stream
    routed = n * (cfg.num_experts * wide + k * (wide + 8 + 4))  # scores, gates, ids, order
    scores = n * (cfg.d_model * widened + cfg.num_experts * wide)

    # Under each stage lie the block's input and, from the second norm on, its sum with the attention. Norms and the
    # rotation need no more than what follows them.
    stages = {
        "attention": 2 * stream + values + z + attention,
        "router": 3 * stream + scores + cfg.num_experts * (cfg.d_model + 1) * widened,
        "experts": 3 * stream + routed + experts,
    }
    where = n * (8 + 8 + 4 * cfg.d_head)  # ids, positions, their cosines and sines
    stages = {name: size + where for name, size in stages.items()}
    if logits:
        stages["logits"] = logits * (cfg.d_model + cfg.d_vocab) * size
    if predictions:
        rows = min(n, predictions) * (cfg.d_vocab + 2 * cfg.d_model) * size
        stages["log-probabilities"] = stream + where + 8 * n + rows
    return stages


def spread(parts: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return part → device: contiguous stages in the parts' order, with the fullest device as empty as possible."""

    def fill(limit: int) -> dict[str, int]:
        places, device, used = {}, 0, 0
        for part, size in parts.items():
            if used + size > limit:
                device, used = device + 1, 0
            places[part], used = device, used + size
        return places

    ends = [0, *accumulate(parts.values())]
    runs = sorted(b - a for a, b in combinations(ends, 2) if b - a >= max(parts.values()))
    return fill(runs[bisect(runs, False, key=lambda run: fill(run)["unembed"] < devices)])


def stages(parts: Mapping[str, int], devices: int) -> list[int]:
    """Return bytes on each device of a `spread`; devices that get nothing are left out."""
    places = spread(parts, devices)
    return [sum(parts[p] for p, d in places.items() if d == device) for device in range(places["unembed"] + 1)]


def devices_for(parts: Mapping[str, int], room: int) -> int | None:
    """Return the fewest devices of `room` bytes that hold the weights; None where one layer is already too much."""
    return next((n for n in range(1, len(parts) + 1) if max(stages(parts, n)) <= room), None)


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, where every smaller one does; 0 if none."""
    return bisect(range(1, _MOST), False, key=lambda n: not fits(n))


def free(device: torch.device) -> int:
    """Return bytes that could hold weights: free memory of a GPU, elsewhere all physical memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse(text: str) -> int:
    """Return bytes of "80GB", "24 GiB" or a plain number.

    Raises:
        InputError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise InputError(f"memory {text[:40]!r}: expected a number and its unit, as in 80GB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def human(n: int) -> str:
    """Return bytes in gigabytes, or below one in megabytes, to three digits after the point."""
    return f"{n / 1e9:,.3f} GB" if n >= 10**9 else f"{n / 1e6:,.3f} MB"
