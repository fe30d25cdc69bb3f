"""The layers of gpt-oss, with hook points: norms, router, experts, blocks, embedding and unembedding.

Reference: openai/gpt-oss, gpt_oss/torch/model.py (commit 7b58334).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from workbench.hooks.hook_points import CheckedHookPoint, checked_experts, hooked
from workbench.kernels import dense, norm, routing
from workbench.kernels.chunking import chunked
from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.moe import ActivationHooks, Experts, LoraWeight, moe
from workbench.kernels.mxfp4 import GROUP, Mxfp4
from workbench.model import fused_block, input_points
from workbench.model.attention import Attention
from workbench.model.config import Config
from workbench.model.low_rank import LowRank
from workbench.model.pass_context import PassContext
from workbench.model.weights import ExpertBiases, ExpertWeights

_EXPERT = "each expert has its own, as in model.blocks[0].mlp.experts.{}(5) of expert 5"
# What TransformerLens' dense models have, and where it is here.
ELSEWHERE = {name: _EXPERT.format(name) for name in ("W_in", "W_out", "W_gate")} | {
    name: "positions are rotary, see cfg.rope" for name in ("W_pos", "W_E_pos", "pos_embed")
}


class RMSNorm(nn.Module):
    """x / rms(x) · weight; in at least float32 until after the weight, only then in x's dtype."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps
        self.hook_scale = CheckedHookPoint()
        self.hook_normalized = CheckedHookPoint()

    @property
    def w(self) -> Tensor:
        """Return the weight, under TransformerLens' name [d]."""
        return self.weight

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        if not hooked(self.hook_scale, self.hook_normalized):
            return self.normalize(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.hook_scale(norm.rms_scale(x, self.eps))
        return (self.hook_normalized(wide / scale) * self.weight.to(wide.dtype)).to(x.dtype)

    def normalize(self, x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch pos *head d"]:
        """Return the normalized values without calling hooks."""
        return chunked(lambda x: norm.rms_norm(x, self.weight, self.eps), x, dim=1)


class Router(nn.Module):
    """A score for every expert, in at least float32: rounding to bfloat16 would tie scores and flip choices."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.experts_of(layer), cfg.d_model))
        self.bias = nn.Parameter(torch.zeros(cfg.experts_of(layer)))
        self.lora: LowRank | None
        self.register_module("lora", None)
        self.hook_out = CheckedHookPoint()

    @property
    def W(self) -> Float[Tensor, "d_model expert"]:  # noqa: N802 - TransformerLens' name
        """Return the matrix in TransformerLens' order, without the update of an adapter."""
        return self.weight.mT

    @property
    def b(self) -> Float[Tensor, " expert"]:
        """Return the bias, under TransformerLens' name."""
        return self.bias

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        return self.hook_out(chunked(self._scores, x, dim=1))

    def _scores(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        out = dense.linear(x, self.weight, self.bias)
        return out if self.lora is None else out + self.lora(x)


class ExpertMatrix(nn.Module):
    """One matrix of every expert and its bias: packed `blocks` and `scales`, or a dense, trainable `weight`.

    Packed matrices may stay as a file holds them (`read_in_place`). They move to memory, in the published order, when
    `blocks` or `scales` is asked for, and when the model is moved to another device or its state is saved or replaced.
    """

    blocks: Tensor
    scales: Tensor

    def __init__(self, num_experts: int, inputs: int, outputs: int, packed: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_experts, outputs))
        if packed:
            self.register_buffer("blocks", torch.zeros(num_experts, outputs, inputs // GROUP, 16, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(num_experts, outputs, inputs // GROUP, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.empty(num_experts, inputs, outputs))
        self.packed = packed
        self.mapped: GgmlMxfp4 | None = None
        self.lora: LowRank | None
        self.register_module("lora", None)

    @property
    def matrix(self) -> Mxfp4 | GgmlMxfp4 | LoraWeight | Tensor:
        """Return the matrices of all experts [expert inputs outputs], packed or dense."""
        base = self.mapped or (Mxfp4(self.blocks, self.scales) if self.packed else self.weight)
        return base if self.lora is None else LoraWeight(base, self.lora.a, self.lora.scaled_b)

    def read_in_place(self, matrices: GgmlMxfp4) -> None:
        """Use packed matrices as a file holds them, instead of `blocks` and `scales`."""
        del self.blocks, self.scales
        self.mapped = matrices

    def _move_to_memory(self) -> None:
        if self.mapped is not None:
            blocks, scales = self.mapped.published()
            self.mapped = None
            self.register_buffer("blocks", blocks)
            self.register_buffer("scales", scales)

    def __getattr__(self, name: str) -> Any:
        if name in ("blocks", "scales") and self.__dict__.get("mapped") is not None:
            self._move_to_memory()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpertMatrix":
        if fn(torch.empty(0, dtype=torch.uint8)).device.type != "cpu":
            self._move_to_memory()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self._move_to_memory()
        super()._save_to_state_dict(*args, **options)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}blocks" in state_dict:
            self._move_to_memory()
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExpertLayer(ExpertWeights, nn.Module):
    """All experts of a layer, run on the slots that chose them."""

    def __init__(self, cfg: Config, layer: int, packed: bool) -> None:
        super().__init__()
        self.cfg = cfg
        num_experts = cfg.experts_of(layer)
        self.gate_up = ExpertMatrix(num_experts, cfg.d_model, 2 * cfg.d_mlp, packed)
        self.down = ExpertMatrix(num_experts, cfg.d_mlp, cfg.d_model, packed)
        self.hook_gate, self.hook_pre, self.hook_post, self.hook_out = (CheckedHookPoint() for _ in range(4))

    def forward(self, x: Tensor, experts: Int[Tensor, "batch pos slot"], gates: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [batch pos d_model]."""
        weights = Experts(
            self.gate_up.matrix,
            self.gate_up.bias,
            self.down.matrix,
            self.down.bias,
            self.cfg.swiglu_limit,
            self.cfg.swiglu_alpha,
        )
        points = (self.hook_gate, self.hook_pre, self.hook_post, self.hook_out)
        taps = ActivationHooks(*(self._tap(point, x.shape[:2]) for point in points))
        out = moe(x.flatten(0, 1), experts.flatten(0, 1), gates.flatten(0, 1), weights, taps)
        return out.unflatten(0, x.shape[:2])

    @staticmethod
    def _tap(point: HookPoint, batch_pos: torch.Size) -> Any:
        return (lambda slots: point(slots.unflatten(0, batch_pos)).flatten(0, 1)) if hooked(point) else None


class MoE(ExpertBiases, nn.Module):
    """Router, choice, gates, experts. An edit of the scores re-routes; an edit of the choice changes who computes."""

    def __init__(self, cfg: Config, layer: int, packed: bool) -> None:
        super().__init__()
        self.k = cfg.experts_per_token
        self.router = Router(cfg, layer)
        self.experts = ExpertLayer(cfg, layer, packed)
        self.hook_expert_indices, self.hook_expert_weights = CheckedHookPoint(), CheckedHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        logits = self.router(x).flatten(0, 1)
        own = routing.top_k(logits, self.k).unflatten(0, x.shape[:2])
        experts = checked_experts(self.hook_expert_indices, own, logits.shape[-1])
        gates = self.hook_expert_weights(routing.gate(logits, experts.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.experts(x, experts, gates)

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise AttributeError(f"a mixture of experts has no {name}: {ELSEWHERE[name]}")
        return super().__getattr__(name)


class Block(nn.Module):
    """x += attention(norm(x)), then x += moe(norm(x))."""

    hook_out_is_single_residual_stream = True  # TransformerLens' logit lens asks every block for this

    def __init__(self, cfg: Config, layer: int, packed: bool) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.ln1, self.ln2 = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        self.attn, self.mlp = Attention(cfg, layer), MoE(cfg, layer, packed)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = (
            CheckedHookPoint(),
            CheckedHookPoint(),
            CheckedHookPoint(),
        )
        self.hook_attn_out, self.hook_mlp_out = CheckedHookPoint(), CheckedHookPoint()
        for name in (*input_points.MLP_IN, *input_points.ATTENTION_IN, *input_points.HEAD_INPUTS):
            self.register_module(name, None)  # see workbench.model.input_points

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], context: PassContext | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block; without a context, that of rows which begin at position 0."""
        if context is None:
            context = PassContext(self.cfg, torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))
        x = self.hook_resid_pre(x)
        if known := fused_block.fused(self, x, context):
            return fused_block.fused_forward(self, known, x, context)
        return self.add_experts(self.add_attention(x, context))

    def add_attention(self, x: Float[Tensor, "batch pos d_model"], context: PassContext) -> Tensor:
        """Return the residual stream between attention and the experts [batch pos d_model]."""
        stream = input_points.read_at(self.get_point("hook_attn_in"), x)
        inputs = input_points.head_inputs(self, stream, self.attn.n_heads, self.attn.n_key_value_heads)
        return self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(stream), context, self.layer, inputs)))

    def add_experts(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the experts."""
        stream = input_points.read_at(self.get_point("hook_mlp_in"), x)
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(stream))))

    def get_point(self, name: str) -> HookPoint | None:
        """Return an optional hook point, or None while it is switched off."""
        point: HookPoint | None = self._modules[name]
        return point


class Embed(nn.Embedding):
    """The embedding of tokens [d_vocab d_model]."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        # torch's own values are never used; on the meta device they take more than a second, for imports
        super().__init__(d_vocab, d_model, _weight=torch.empty(d_vocab, d_model))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802 - TransformerLens' name
        """Return the matrix, under TransformerLens' name."""
        return self.weight


class Unembed(nn.Module):
    """Logits, without a bias."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.lora: LowRank | None
        self.register_module("lora", None)
        self.hook_out = CheckedHookPoint()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # noqa: N802 - TransformerLens' name
        """Return the matrix with the update of an adapter, under TransformerLens' name and in its order."""
        return self.weight.mT if self.lora is None else self.weight.mT + self.lora.a @ self.lora.scaled_b

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:  # noqa: N802 - TransformerLens' name
        """Return zeros: gpt-oss has no bias here."""
        return torch.zeros(len(self.weight), device=self.weight.device)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        out = dense.linear(x, self.weight)
        return self.hook_out(out if self.lora is None else out + self.lora(x))
