"""Grouped-query causal attention with learned sinks and sliding windows, and the hook points inside it.

The fused kernel computes the output, the log-sum-exp and the sink's probability. Scores, pattern and per-head results
are computed beside it while they are hooked, in that layer; a hook that only reads them leaves every bit of the model
as it is (see `workbench.hooks.observation`).

Reference: openai/gpt-oss, gpt_oss/torch/model.py, AttentionBlock (commit 7b58334).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.hooks.hook_points import CheckedHookPoint, hooked
from workbench.hooks.observation import either, observe, replace_changed
from workbench.kernels import attention as attend
from workbench.model.config import Config
from workbench.model.input_points import HeadInput
from workbench.model.low_rank import Linear
from workbench.model.pass_context import PassContext
from workbench.model.rope import rotate
from workbench.model.weights import AttentionWeights


class Attention(AttentionWeights, nn.Module):
    """Grouped-query causal attention with a learned sink per head, windowed where the config states it."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.cfg, self.d_head, self.window = cfg, cfg.d_head, cfg.windows[layer]
        self.n_heads, self.n_key_value_heads = cfg.n_heads, cfg.n_key_value_heads
        self.ungrouped = False  # whether keys and values are repeated for every query head
        self.q = Linear(cfg.d_model, cfg.n_heads * cfg.d_head)
        self.k = Linear(cfg.d_model, cfg.n_key_value_heads * cfg.d_head)
        self.v = Linear(cfg.d_model, cfg.n_key_value_heads * cfg.d_head)
        self.o = Linear(cfg.n_heads * cfg.d_head, cfg.d_model)
        self.sinks = nn.Parameter(torch.zeros(cfg.n_heads))
        self.hook_q, self.hook_k, self.hook_v = CheckedHookPoint(), CheckedHookPoint(), CheckedHookPoint()
        self.hook_rot_q, self.hook_rot_k = CheckedHookPoint(), CheckedHookPoint()
        self.hook_attn_scores, self.hook_sink, self.hook_pattern = (
            CheckedHookPoint(),
            CheckedHookPoint(),
            CheckedHookPoint(),
        )
        self.hook_z, self.hook_result = CheckedHookPoint(), CheckedHookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        context: PassContext,
        layer: int,
        inputs: Mapping[str, HeadInput] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the output of this layer's attention, which is added to the residual stream.

        inputs: what single heads' queries, keys and values read where a hook edited it.

        Raises:
            InputError: keys per query head cannot be cached.
        """
        q, k, v = (part(x).unflatten(-1, (-1, self.d_head)) for part in (self.q, self.k, self.v))
        if inputs:
            parts = {"q": (self.q, q), "k": (self.k, k), "v": (self.v, v)}
            q, k, v = (inputs[n].project(*own) if n in inputs else own[1] for n, own in parts.items())
        if self.ungrouped:
            k, v = (part.repeat_interleave(self.n_heads // self.n_key_value_heads, 2) for part in (k, v))
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        q = self.hook_rot_q(rotate(q, context.cos, context.sin))
        k = self.hook_rot_k(rotate(k, context.cos, context.sin))
        if context.cache is not None:
            if self.ungrouped:
                raise InputError("a cache holds grouped keys: call set_ungroup_grouped_query_attention(False) first")
            seen = context.cache.extend(layer, k, v)
            k, v, context = seen.keys, seen.values, context.among(seen)
        return self._project(self.hook_z(self._attend(q, k, v, context)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: PassContext) -> Float[Tensor, "batch pos head d_head"]:
        """Return the weighted values of every head, by the fused kernel except where a hook changes something."""

        def kernel(sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return attend.attention(q, k, v, context.positions, self.window, lengths=context.lengths, sinks=sinks)

        z, _, sink = kernel(self.sinks)
        assert sink is not None
        if hooked(self.hook_attn_scores, self.hook_pattern):
            return self._materialized(q, k, v, context, z, sink)
        if not hooked(self.hook_sink):
            return z
        p, changed = self._observe_sink(sink)
        return replace_changed(z, lambda: attend.shrink(kernel(None)[0], p), _row(changed), p)

    def _materialized(
        self, q: Tensor, k: Tensor, v: Tensor, context: PassContext, z: Tensor, sink: Tensor
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return `z`, computed again where hooks changed scores, sink or pattern.

        Scores and pattern have every position so far on their last axis, also where a cache holds the window only.
        """
        k, v, context = context.every_key(k, v)
        visible = context.visible(q.shape[1], k.shape[1], self.window)

        def scores() -> Tensor:
            return attend.scores(q, k, visible)

        edited, changed_scores = None, None
        if hooked(self.hook_attn_scores):
            edited, changed_scores = observe(self.hook_attn_scores, scores(), scores)

        def weights() -> tuple[Tensor, Tensor]:
            return attend.softmax(scores(), in_place=True) if edited is None else attend.softmax(edited)

        weight, lse = weights()
        changed_rows = None if changed_scores is None else changed_scores.any(-1).mT
        sink = replace_changed(sink, lambda: self._sink(lse), changed_rows, lse)
        p, changed_sink = self._observe_sink(sink)
        pattern = _scaled(weight, 1 - p)
        del weight
        changed_pattern = None
        if hooked(self.hook_pattern):
            again: Callable[[], Tensor] = lambda: _scaled(weights()[0], 1 - p)  # noqa: E731
            pattern, changed_pattern = observe(self.hook_pattern, pattern, again)
        changed = either(changed_rows, changed_sink, None if changed_pattern is None else changed_pattern.any(-1).mT)
        return replace_changed(z, lambda: attend.combine(pattern, v).to(q.dtype), _row(changed), pattern)

    def _sink(self, lse: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos head"]:
        """Return the sink's probability beside keys of this log-sum-exp."""
        return torch.sigmoid(self.sinks.to(lse.dtype) - lse)

    def _observe_sink(self, sink: Tensor) -> tuple[Tensor, Tensor | None]:
        return observe(self.hook_sink, sink.clone(), lambda: sink) if hooked(self.hook_sink) else (sink, None)

    def _project(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the output projection; `hook_result` sees what each head adds, without the bias."""
        out = self.o(z.flatten(-2))
        if not hooked(self.hook_result):
            return out

        def by_head() -> Tensor:
            return torch.einsum("bphd,mhd->bphm", z, self.o.matrix.unflatten(1, (-1, self.d_head)))

        result, changed = observe(self.hook_result, by_head(), by_head)
        changed_rows = None if changed is None else changed.flatten(2).any(-1, keepdim=True)
        return replace_changed(out, lambda: result.sum(2) + self.o.bias, changed_rows, result)


def _row(changed: Tensor | None) -> Tensor | None:
    """Broadcast a mask of queries and heads over d_head."""
    return None if changed is None else changed[..., None]


def _scaled(
    weight: Float[Tensor, "batch head query key"], factor: Float[Tensor, "batch query head"]
) -> Float[Tensor, "batch head query key"]:
    """Multiply every row by its factor: in place where no gradient needs the tensor."""
    factor = factor.mT[..., None]
    graph = torch.is_grad_enabled() and (weight.requires_grad or factor.requires_grad)
    return weight * factor if graph else weight.mul_(factor)
