"""Attention patterns of one sequence, with the learned sink as a column of its own.

    patterns = attention_patterns.load(model, ids, layers=[0], start=0, stop=100)
    patterns["pattern"].sel(layer=0, head=3)    # [query key]; `sink` beside it

One forward pass computes them, up to the last layer that is asked for. A pattern of n tokens has n² values for each
head, so a window of tokens is kept: attention to keys before the window is summed in `earlier`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.errors import InputError
from workbench.model.transformer import GptOss
from workbench.runs.attention_file import MAX_CONTEXT, MAX_VALUES
from workbench.version import version


@torch.no_grad()
def load(
    model: GptOss, ids: Sequence[int], *, layers: Sequence[int] | None = None, start: int = 0, stop: int | None = None
) -> xr.Dataset:
    """Return `pattern` [layer head query key], and `sink` and `earlier` [layer head query], which sum to one.

    layers: all by default. start, stop: the window of tokens; by default from the first token on, as many as fit
    `MAX_VALUES` values.

    Raises:
        InputError: a layer or the window is not in the sequence, or the patterns take too much memory.
    """
    cfg = model.cfg
    chosen = list(range(cfg.n_layers)) if layers is None else sorted(set(layers))
    if not chosen or not set(chosen) <= set(range(cfg.n_layers)):
        raise InputError(f"layers {list(layers or ())}: expected some of 0 to {cfg.n_layers - 1}")
    stop = min(len(ids), start + fitting_tokens(len(chosen), cfg.n_heads)) if stop is None else stop
    _check_window(start, stop, len(ids), len(chosen), cfg.n_heads)
    parts: dict[str, list[np.ndarray]] = {"pattern": [], "sink": [], "earlier": []}

    def pattern(x: Tensor, hook: object) -> None:
        rows = x[0, :, start:stop].float()
        parts["earlier"].append(rows[:, :, :start].sum(-1).cpu().numpy())
        parts["pattern"].append(rows[:, :, start:stop].cpu().numpy())

    def sink(x: Tensor, hook: object) -> None:
        parts["sink"].append(x[0, start:stop].float().mT.cpu().numpy())

    points = {"attn.hook_sink": sink, "attn.hook_pattern": pattern}
    hooks = [(f"blocks.{layer}.{name}", hook) for layer in chosen for name, hook in points.items()]
    tokens = torch.as_tensor(np.asarray(ids[:stop]).astype(np.int64), device=model.device)[None]
    model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=chosen[-1] + 1)
    arrays = {name: np.stack(values) for name, values in parts.items()}
    dims = ("layer", "head", "query", "key")
    coords = {"layer": chosen, "head": range(cfg.n_heads), "query": range(start, stop), "key": range(start, stop)}
    about = {"checkpoint_digest": model.checkpoint.digest, "workbench_version": version()}
    return xr.Dataset({name: (dims[: a.ndim], a) for name, a in arrays.items()}, coords, about)


def fitting_tokens(n_layers: int, n_heads: int) -> int:
    """Return the largest window whose patterns of this many layers fit `MAX_VALUES` values."""
    return max(1, math.isqrt(MAX_VALUES // (n_layers * n_heads)))


def _check_window(start: int, stop: int, length: int, n_layers: int, n_heads: int) -> None:
    if not 0 <= start < stop <= length:
        raise InputError(f"tokens {start}-{stop - 1}: expected a range within 0-{length - 1}, the sequence's tokens")
    if (values := n_layers * n_heads * (stop - start) ** 2) > MAX_VALUES:
        most = fitting_tokens(n_layers, n_heads)
        raise InputError(
            f"{n_layers} layers × {n_heads} heads × {stop - start}² tokens are {values:,} values, of at most "
            f"{MAX_VALUES:,}: choose fewer layers, or at most {most} tokens"
        )
    if n_heads * stop**2 > MAX_CONTEXT:
        raise InputError(
            f"a layer's pattern of {stop:,} tokens takes {4 * n_heads * stop**2 / 1e9:.0f} GB: choose a window that "
            f"ends before token {math.isqrt(MAX_CONTEXT // n_heads):,}"
        )
