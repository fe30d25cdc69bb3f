"""Causal attention with grouped heads, a sliding window, and the quantity a sink needs: the log-sum-exp.

A sink is one learned logit per head that takes part in the softmax and is then dropped. Attention over the keys
alone, with its log-sum-exp, is enough to have it: the sink's probability is p = sigmoid(sink − lse), and every
weight on a key shrinks by 1 − p. So the kernel knows nothing of sinks, and editing p needs no pattern.

Keys sit at their own positions: query at position t sees keys max(0, t − window + 1) … t. Hence right padding
and unequal prefixes need no mask.

Reference: openai/gpt-oss, gpt_oss/torch/model.py, sdpa; FlashAttention-2 (arXiv 2307.08691) for the row statistics.
Cost for T queries on S visible keys: 4 · T · S · n_heads · d_head flops; memory linear in T.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_QUERY_BLOCK = 256  # scores of one block of 64 heads on 4,096 keys: 268 MB in float32


def visible(
    query_pos: Int[Tensor, "batch query"], key_pos: Int[Tensor, " key"], window: int | None
) -> Bool[Tensor, "batch query key"]:
    """Which keys a query sees: itself and those before it, at most `window` in all."""
    distance = query_pos[:, :, None] - key_pos
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    mask: Bool[Tensor, "batch query key"],
) -> Float[Tensor, "batch head query key"]:
    """Scaled dot products in at least float32, −inf where masked; query head h reads kv head h // (heads / kv)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    out = torch.einsum("bqkgd,bskd->bkgqs", grouped, k.to(wide)) * q.shape[-1] ** -0.5
    return out.flatten(1, 2).masked_fill(~mask[:, None], -torch.inf)


def combine(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Values summed by a pattern."""
    grouped = pattern.unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgqs,bskd->bqkgd", grouped, v.to(pattern.dtype)).flatten(2, 3)


def softmax(
    scores: Float[Tensor, "batch head query key"],
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch query head"]]:
    """Softmax over the keys and its log-sum-exp; a row that sees no key is zero, its log-sum-exp the least float."""
    limits = torch.finfo(scores.dtype)
    top = scores.amax(-1, keepdim=True).clamp(min=limits.min)
    weight = (scores - top).exp()
    total = weight.sum(-1, keepdim=True).clamp(min=limits.tiny)
    return weight / total, (top + total.log()).squeeze(-1).mT


def attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    v: Float[Tensor, "batch key kv d_head"],
    query_pos: Int[Tensor, "batch query"],
    window: int | None,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch query head"]]:
    """Attention over the keys alone and its log-sum-exp, in at least float32.

    One block of queries at a time, on the keys that some query of the block can see.
    """
    outs, lses = [], []
    for start in range(0, q.shape[1], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        pos = query_pos[:, rows]
        first = 0 if window is None else max(0, int(pos.min()) - window + 1)
        keys = slice(first, int(pos.max()) + 1)
        mask = visible(pos, torch.arange(keys.start, keys.stop, device=q.device), window)
        pattern, lse = softmax(scores(q[:, rows], k[:, keys], mask))
        outs.append(combine(pattern, v[:, keys]))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)
