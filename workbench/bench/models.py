"""The whole model on a card: decoding, prefill and capture, beside the limits of that card.

Weights are random and in their published shape; of a model that does not fit, as many layers as do. The time of its
layers is then scaled to all of them, and the row states it.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.bench.timing import Clock, Limits
from workbench.capture.record_buffers import Buffers
from workbench.capture.recording import parse
from workbench.model.cache import KVCache
from workbench.model.config import GROUP, Config
from workbench.model.decode_graph import DecodeStep
from workbench.model.export import RandomTensors
from workbench.model.names import shapes
from workbench.model.transformer import GptOss

_MARGIN = 0.9  # of the free memory: activations need the rest


class Work(NamedTuple):
    """Bytes moved and flops multiplied."""

    bytes: float
    flops: float


def measure(
    clock: Clock, limits: Limits, name: str, cfg: Config, prefills: tuple[int, ...], batches: tuple[int, ...], past: int
) -> list[dict[str, Any]]:
    """Return a row for each prefill, plain and recorded, and each batch that decodes after `past` tokens."""
    n = fitting(cfg, clock.device, max(batches) * (past + steps_room(clock)))
    model = random_model(replace(cfg, n_layers=n, windows=cfg.windows[:n]), clock.device)
    rows = []
    with torch.no_grad():
        for tokens in prefills:
            plain, recorded, distinct = _prefill(clock, model, tokens)
            row = _row(name, cfg, n, f"prefill of {tokens:,}, no logits", tokens, plain, 0.0)
            least = limits.seconds(*layers(cfg, 1, tokens, 0, distinct))
            rows.append(row | {"fraction": least / row["seconds"], "recording": recorded / plain - 1})
        for batch in batches:
            step_s, eager_s, unembed_s, distinct = _decode(clock, model, batch, past)
            row = _row(name, cfg, n, f"decode of {batch} after {past:,}", batch, step_s - unembed_s, unembed_s)
            row |= {"eager_s": (eager_s - unembed_s) * cfg.n_layers / n + unembed_s}
            vocabulary = Work(2.0 * cfg.d_vocab * cfg.d_model, 2.0 * batch * cfg.d_vocab * cfg.d_model)
            least = limits.seconds(*map(sum, zip(layers(cfg, batch, 1, past, distinct), vocabulary, strict=True)))
            rows.append(row | {"fraction": least / row["seconds"]})
    return rows


def _row(name: str, cfg: Config, n: int, problem: str, tokens: int, layer_s: float, unembed_s: float) -> dict[str, Any]:
    seconds = layer_s * cfg.n_layers / n + unembed_s
    scaled = {"scaled_from_layers": n} if n < cfg.n_layers else {}
    return {"model": name, "problem": problem, "seconds": seconds, "tokens_per_s": tokens / seconds, **scaled}


def layers(cfg: Config, batch: int, new: int, past: int, distinct: float) -> Work:
    """Return all layers' work on `new` tokens a row after `past`, when `distinct` experts a layer are hit."""
    kv = 2 * cfg.n_key_value_heads * cfg.d_head
    matrices = cfg.d_model * (2 * cfg.n_heads * cfg.d_head + kv) + cfg.d_model * cfg.num_experts
    expert, tokens, keys = 3 * cfg.d_model * cfg.d_mlp, batch * new, past + new
    bytes = flops = 0.0
    for window in cfg.windows:
        reach = keys if window is None else window
        pairs = batch * sum(min(t + 1, reach) for t in range(past, keys))
        bytes += 2 * matrices + distinct * expert * (16 + 1) / GROUP + 2 * batch * min(keys, new + reach - 1) * kv
        flops += 2 * tokens * (matrices + cfg.experts_per_token * expert) + 4 * pairs * cfg.n_heads * cfg.d_head
    return Work(bytes, flops)


def fitting(cfg: Config, device: torch.device, cached: int) -> int:
    """Return how many layers fit a GPU's free memory beside `cached` tokens, an even number; elsewhere all of them."""
    if device.type != "cuda":
        return cfg.n_layers
    gc.collect()  # a hooked model is a circle of references
    torch.cuda.empty_cache()
    free = _MARGIN * torch.cuda.mem_get_info(device)[0] - 4 * cfg.d_vocab * cfg.d_model
    kv = 2 * cfg.n_key_value_heads * cfg.d_head
    layer = 3 * cfg.num_experts * cfg.d_model * cfg.d_mlp * (16 + 1) / GROUP
    layer += 2 * cfg.d_model * (2 * cfg.n_heads * cfg.d_head + kv) + 2 * cached * kv
    return max(2, min(cfg.n_layers, int(free / layer) // 2 * 2))


def random_model(cfg: Config, device: torch.device) -> GptOss:
    """Return a model of random weights: two layers are drawn, the others are copies of them in memory of their own."""
    drawn = RandomTensors(replace(cfg, n_layers=2, windows=cfg.windows[:2]), device=device)
    first: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name in shapes(cfg, "mxfp4"):
        source = name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            source = f"blocks.{int(layer) % 2}.{rest}"
        if source in first:
            state[name] = first[source].clone()
        else:
            state[name] = first[source] = drawn[source]
    with torch.device("meta"):
        model = GptOss(cfg, packed=True)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _tokens(model: GptOss, batch: int, new: int) -> Tensor:
    rng = torch.Generator().manual_seed(new)
    return torch.randint(model.cfg.d_vocab, (batch, new), generator=rng).to(model.device)


def _distinct(model: GptOss, forward: Callable[[], object]) -> float:
    """Return experts hit in one layer by one pass, on average."""
    counts: list[int] = []
    hooks = [
        (f"blocks.{layer}.mlp.hook_expert_indices", lambda ids, hook: counts.append(len(ids.unique())))
        for layer in range(model.cfg.n_layers)
    ]
    with model.hooks(fwd_hooks=hooks):
        forward()
    return sum(counts) / len(counts)


def _prefill(clock: Clock, model: GptOss, tokens: int) -> tuple[float, float, float]:
    """Return seconds plain and with routing and sinks recorded as a capture does, and the experts hit in a layer."""
    row = _tokens(model, 1, tokens)
    buffers = Buffers(parse(["routing", "sinks"], model.cfg), model.cfg, tokens, pinned=model.device.type == "cuda")
    labels = np.zeros(tokens, dtype=np.int64)

    def recorded() -> None:
        buffers.start(labels, labels, labels, {})
        buffers.begin(tokens)
        with model.hooks(fwd_hooks=buffers.fwd_hooks):
            model.residual(row)
        buffers.take()

    def plain() -> None:
        model.residual(row)

    return clock(plain), clock(recorded), _distinct(model, plain)


def _decode(clock: Clock, model: GptOss, batch: int, past: int) -> tuple[float, float, float, float]:
    """Return seconds of a step of `generate`, of one without CUDA graphs and of the logits; experts hit in a layer."""
    new, room = _tokens(model, batch, 1), steps_room(clock)
    seconds = []
    for graphs in (True, False):
        cache = KVCache(model.cfg, batch, past + room, dtype=model.dtype, device=model.device)
        cache.advance(past)
        model.cuda_graphs, step = graphs, DecodeStep(model, cache)
        seconds.append(clock(partial(step, new[:, 0])))
        del cache, step
    model.cuda_graphs = True
    x = model.residual(new)
    unembed = clock(lambda: model.unembed(model.ln_final(x)))
    return seconds[0], seconds[1], unembed, _distinct(model, lambda: model.residual(new))


def steps_room(clock: Clock) -> int:
    """Return the positions that a cache needs for all steps that the clock takes."""
    return clock.launches + 1
