"""Causal attention with grouped heads, a sliding window, and the quantity a sink needs: the log-sum-exp.

A sink is one learned logit per head that takes part in the softmax and is then dropped. Attention over the keys
alone, with its log-sum-exp, is enough to have it: the sink's probability is p = sigmoid(sink − lse), and every
weight on a key shrinks by 1 − p. So edits of p need neither sinks nor a pattern in this module.

Keys sit at their own positions: query at position t sees keys max(0, t − window + 1) … t. Hence right padding
and unequal prefixes need no mask.

Ways through it on a CPU, for bfloat16 without gradients: one query a row takes the loops of `kernels.cpu.layer`, and
16 or more those of `kernels.cpu.sequences` where the processor has AVX-512 and multiplies bfloat16 slowly. Elsewhere
complete sequences take torch's flash attention, in float32 if bfloat16 is slow; window layers in blocks that see only
their own keys. Continued sequences and gradients take blocks of plain torch.
Measured, one thread (Emerald Rapids), 64 heads of 64 on 8 of keys, 4,096 tokens: causal 1.12 s, a window of 128 0.13 s;
by torch's flash attention in float32 1.45 and 0.35 s.

Reference: openai/gpt-oss, gpt_oss/torch/model.py, sdpa; FlashAttention-2 (arXiv 2307.08691) for the row statistics.
Cost for T queries on S visible keys: 4 · T · S · n_heads · d_head flops; memory linear in T.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.kernels import cpu, dispatch
from workbench.kernels.chunking import chunked

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_WINDOW_BLOCK = 64  # queries that share the keys of a window; 128: 1.2 × the time, 256: 1.4 ×
_QUERY_BLOCK = 256  # scores of one block of 64 heads on 4,096 keys: 268 MB in float32


def visible(
    query_pos: Int[Tensor, "batch query"], key_pos: Int[Tensor, " key"], window: int | None
) -> Bool[Tensor, "batch query key"]:
    """Return which keys a query sees: itself and those before it, at most `window` in all."""
    distance = query_pos[:, :, None] - key_pos
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    mask: Bool[Tensor, "batch query key"],
) -> Float[Tensor, "batch head query key"]:
    """Return scaled dot products in at least float32, −inf where masked; query head h reads kv head h·kv // heads."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    out = torch.einsum("bqkgd,bskd->bkgqs", grouped, k.to(wide)).mul_(q.shape[-1] ** -0.5)
    return out.flatten(1, 2).masked_fill_(~mask[:, None], -torch.inf)


def combine(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Return values summed by a pattern."""
    grouped = pattern.unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgqs,bskd->bqkgd", grouped, v.to(pattern.dtype)).flatten(2, 3)


def softmax(
    scores: Float[Tensor, "batch head query key"], *, in_place: bool = False
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch query head"]]:
    """Return the softmax over the keys and its log-sum-exp.

    A row that sees no key is zero, its log-sum-exp the least float. With `in_place` the scores' memory is used where
    no gradient needs it.
    """
    limits = torch.finfo(scores.dtype)
    top = scores.amax(-1, keepdim=True).clamp(min=limits.min)
    if in_place and not (torch.is_grad_enabled() and scores.requires_grad):
        weight = scores.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True).clamp(min=limits.tiny)
        return weight.div_(total), (top + total.log()).squeeze(-1).mT
    weight = (scores - top).exp()
    total = weight.sum(-1, keepdim=True).clamp(min=limits.tiny)
    return weight / total, (top + total.log()).squeeze(-1).mT


def attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    v: Float[Tensor, "batch key kv d_head"],
    query_pos: Int[Tensor, "batch query"],
    window: int | None,
    *,
    lengths: Sequence[int] | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch query head"], Tensor | None]:
    """Return attention, the log-sum-exp of each row's scores, and the sink's probability [batch query head].

    Without sinks all is over the keys alone, and the third is None. The positions of a row are consecutive. With
    `lengths` the single row holds several sequences end to end, which do not see each other.
    """
    if gpu := dispatch.triton("attention", q):
        return gpu.attention(q, k, v, query_pos, window, lengths=lengths, sinks=sinks)
    layer = cpu.few_rows(q[:, 0, 0], q, k, v, sinks) if q.shape[1] == 1 and lengths is None else None
    if layer and layer.covers_attention(q, k):
        return layer.attention(q, k, v, query_pos, window, sinks)
    if lengths is None:
        return _sequences(q, k, v, query_pos, window, sinks)
    parts = [_sequences(q[:, s], k[:, s], v[:, s], query_pos[:, s], window, sinks) for s in spans(lengths)]
    z, lse, p = zip(*parts, strict=True)
    return torch.cat(z, 1), torch.cat(lse, 1), None if sinks is None else torch.cat(p, 1)


def shrink(z: Float[Tensor, "batch query head d_head"], sink: Float[Tensor, "batch query head"]) -> Tensor:
    """Return attention over keys with a sink of this probability [batch query head d_head], in the dtype of z."""
    return chunked(lambda z, sink: (z * (1 - sink)[..., None]).to(z.dtype), z, sink, dim=1)


def spans(lengths: Sequence[int]) -> list[slice]:
    """Return the slice of each of several sequences that were put end to end; empty ones are left out."""
    ends = list(itertools.accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True) if n]


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `attention` returns of one batch of sequences."""
    loops = cpu.many_queries(q, k, v, sinks)
    if loops and loops.covers(q, k, v):
        return loops.attention(q, k, v, query_pos, window, sinks)
    z, lse = _over_keys(q, k, v, query_pos, window)
    if sinks is None:
        return z, lse, None
    p = torch.sigmoid(sinks.to(lse.dtype) - lse)
    return shrink(z, p), torch.logaddexp(lse, sinks.to(lse.dtype)), p


def _over_keys(q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return attention of a batch of sequences over the keys alone, and the log-sum-exp of its scores."""
    from_start = q.shape[1] == k.shape[1] and not bool(query_pos[:, 0].any())
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[1] == 1 and not graph and q.device.type == "cpu":
        z, lse = _one_query(q, k, v, query_pos, window)
        own_keys = k[torch.arange(len(k)), query_pos[:, 0]][:, None]  # earlier ones were seen by their own queries
        return _with_nan(z, lse, _meets_nan(q, own_keys, window))
    if not from_start or graph or q.device.type != "cpu":
        return _blocks(q, k, v, query_pos, window)
    own_window = None if window is None or window >= q.shape[1] else window
    if cpu.product_dtype(q, k, v) == q.dtype:
        z, lse = _complete(q, k, v, own_window)
    else:  # a key head at a time: the widened values of all heads can take more memory than the model
        groups = zip(q.chunk(k.shape[2], 2), k.split(1, 2), v.split(1, 2), strict=True)
        parts = [_complete(a.float(), b.float(), c.float(), own_window) for a, b, c in groups]
        z = torch.cat([part.to(q.dtype) for part, _ in parts], 2)
        lse = torch.cat([part for _, part in parts], 2)
    return _with_nan(z, lse, _meets_nan(q, k, window))


def _complete(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return attention of complete sequences, by torch's flash attention."""
    if window is not None:
        return _banded(q, k, v, window)
    z, lse = _flash(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, True)
    return z.transpose(1, 2), lse.transpose(1, 2)


def _meets_nan(q: Tensor, k: Tensor, window: int | None) -> Bool[Tensor, "batch query head"]:
    """Return whether a query, or a key that it sees, holds NaN, for as many keys as queries.

    Below 16 keys torch's flash attention computes with a NaN score as with a number (torch 2.13), so that its results
    do not show it. A sum is NaN where a term is. Cost: 0 to 4 % of the time of attention to 2,048 tokens.
    """
    count = k.sum(-1).isnan().cumsum(1)
    if window is not None and window < count.shape[1]:
        count = torch.cat([count[:, :window], count[:, window:] - count[:, :-window]], 1)
    return q.sum(-1).isnan() | (count > 0).repeat_interleave(q.shape[2] // k.shape[2], -1)


def _with_nan(z: Tensor, lse: Tensor, where: Bool[Tensor, "batch query head"]) -> tuple[Tensor, Tensor]:
    return z.masked_fill_(where[..., None], torch.nan), lse.masked_fill(where, torch.nan)


def _one_query(q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return attention of one query a row on the row's own keys: no other row and no key out of reach changes it.

    The query heads of a kv head are the queries of one call, which reads its keys and values once and copies none.
    """
    outs, lses = [], []
    for row, last in enumerate(query_pos[:, 0].tolist()):
        keys = slice(0 if window is None else max(0, last - window + 1), last + 1)
        grouped = q[row].unflatten(1, (k.shape[2], -1))[0][None]
        z, lse = _flash(grouped, *(t[row : row + 1, keys].transpose(1, 2) for t in (k, v)), 0.0, False)
        outs.append(z.flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.stack(outs), torch.stack(lses)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Whole sequences in blocks of queries, each beside the keys it can see: [batch · block, head, row, d_head]."""
    n, size, reach = q.shape[1], min(_WINDOW_BLOCK, q.shape[1]), window - 1
    fill = -n % size
    rows = nn.functional.pad(q, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, size)).transpose(2, 3)
    # Views, not copies: a key is in every block that can see it.
    seen = [nn.functional.pad(t, (0, 0, 0, 0, reach, fill)).unfold(1, size + reach, size).mT for t in (k, v)]
    distance = torch.arange(size)[:, None] + reach - torch.arange(size + reach)
    real = torch.arange(size + reach) >= reach - size * torch.arange(rows.shape[1])[:, None]
    mask = torch.zeros(rows.shape[1], 1, size, size + reach, dtype=q.dtype)
    mask.masked_fill_(~((distance >= 0) & (distance < window) & real[:, None])[:, None], -torch.inf)
    z, lse = _flash(
        rows.flatten(0, 1), *(t.flatten(0, 1) for t in seen), 0.0, False, attn_mask=mask.repeat(q.shape[0], 1, 1, 1)
    )
    z, lse = (t.unflatten(0, rows.shape[:2]) for t in (z.transpose(1, 2), lse.mT))
    return z.flatten(1, 2)[:, :n], lse.flatten(1, 2)[:, :n]


def _blocks(q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return attention a block of queries at a time, on the keys that some query of the block can see."""
    outs, lses = [], []
    for start in range(0, q.shape[1], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        pos = query_pos[:, rows]
        if window is None or len(q) == 1:
            first = 0 if window is None else max(0, int(pos.min()) - window + 1)
            keys = slice(first, int(pos.max()) + 1)
            seen, values, pos = k[:, keys], v[:, keys], pos - first
        else:
            seen, values, pos = _own_windows(k, v, pos, window)
        mask = visible(pos, torch.arange(seen.shape[1], device=q.device), window)
        pattern, lse = softmax(scores(q[:, rows], seen, mask))
        outs.append(combine(pattern, values).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _own_windows(k: Tensor, v: Tensor, pos: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each row the keys and values that its queries reach, and the queries' positions among those.

    Rows of a batch can stand at different positions. Each reads its own window, so that what it reads depends neither
    on the other rows nor on how much of the past is in k.
    """
    first = (pos[:, :1] - (window - 1)).clamp(min=0)
    pos = pos - first
    columns = first + torch.arange(int(pos.max()) + 1, device=k.device)
    rows = torch.arange(len(k), device=k.device)[:, None]
    columns = columns.clamp(max=k.shape[1] - 1)  # beyond a shorter row's last query; masked
    return k[rows, columns], v[rows, columns], pos
