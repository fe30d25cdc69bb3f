"""Hook points of what a block's parts read, apart from the residual stream that goes on: TransformerLens' switches.

`model.set_use_hook_mlp_in(True)` adds `hook_mlp_in`, `set_use_attn_in(True)` adds `hook_attn_in`, both
[batch pos d_model], and `set_use_split_qkv_input(True)` adds `hook_q_input`, `hook_k_input` and `hook_v_input`
[batch pos head d_model], the stream that each head's queries, keys and values are made of. An edit changes what this
part reads and nothing else, as path patching needs. The points do not exist before, so they cost nothing.

Reference: TransformerLens, TransformerBlock; path patching, Goldowsky-Dill et al. 2023, arXiv 2304.05969.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.hooks.hook_points import CheckedHookPoint, hooked
from workbench.hooks.observation import observe, replace_changed
from workbench.model.low_rank import Linear

MLP_IN, ATTENTION_IN = ("hook_mlp_in",), ("hook_attn_in",)
HEAD_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input")
SWITCHES = {
    "hook_mlp_in": "set_use_hook_mlp_in",
    "hook_attn_in": "set_use_attn_in",
    **dict.fromkeys(HEAD_INPUTS, "set_use_split_qkv_input"),
}


class HeadInput(NamedTuple):
    """What the heads read after an edit, normalized, and where it is not the stream."""

    normalized: Float[Tensor, "batch pos head d_model"]
    changed: Bool[Tensor, "batch pos head d_model"] | None

    def project(self, linear: Linear, fused: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        """Return `fused` [batch pos head d_head], but the projection of the edited inputs where a hook changed them."""

        def by_head() -> Tensor:
            heads = self.normalized.shape[2]
            weight, bias = linear.matrix.unflatten(0, (heads, -1)), linear.bias.unflatten(0, (heads, -1))
            return torch.einsum("bphm,hdm->bphd", self.normalized, weight) + bias

        rows = None if self.changed is None else self.changed.any(-1, keepdim=True)
        return replace_changed(fused, by_head, rows, self.normalized)


def register(block: nn.Module, names: tuple[str, ...], wanted: bool) -> None:
    """Add these hook points to a block, or remove them."""
    for name in names:
        if not wanted or getattr(block, name) is None:
            block.register_module(name, CheckedHookPoint() if wanted else None)


def read_at(point: HookPoint | None, stream: Tensor) -> Tensor:
    """Return a copy of the stream [batch pos d_model] as the point's hooks leave it, or the stream without a point."""
    return stream if point is None else point(stream.clone())


def head_inputs(
    block: Any, stream: Float[Tensor, "batch pos d_model"], heads: int, kv_heads: int
) -> dict[str, HeadInput]:
    """Return the inputs of queries ("q"), keys ("k") and values ("v"), for those whose hook point has a hook."""
    inputs = {}
    for part, name, n in zip("qkv", HEAD_INPUTS, (heads, kv_heads, kv_heads), strict=True):
        point = getattr(block, name)
        if point is not None and hooked(point):
            wide = stream[:, :, None].expand(-1, -1, n, -1)
            edited, changed = observe(point, wide.clone(), partial(torch.clone, wide))
            inputs[part] = HeadInput(block.ln1.normalize(edited), changed)
    return inputs
