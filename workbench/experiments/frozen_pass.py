"""One pass of a model with its non-linear parts frozen: every logit is then a sum over paths, followed exactly.

Frozen are attention patterns (with the sink's share), scales of the norms, and each token's experts and gate weights.
What remains is linear but for the experts' activation, a product: each of its two factors gets half of it, and the
sigmoid and the clamps count as the ratio of what goes out and what comes in. So a direction at the end of the stream
can be followed backwards, and at every node what flows in equals what flows out, to rounding. Autoencoders may be
attached to the residual stream (`dictionary_features`): then all that passes them is features and a constant error.

Reference: LRP for products and RelP, Jafari et al. 2025, arXiv 2508.21258; frozen attention and norms as in circuit
tracing, Ameisen et al. 2025.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.dictionary_features import ActiveFeatures, FeatureFlow, active_features, places
from workbench.hooks.sae import SAE
from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.moe import LoraWeight, swiglu
from workbench.kernels.mxfp4 import Mxfp4, input_gradient
from workbench.kernels.parallel import parallel_map
from workbench.model import memory
from workbench.model.transformer import GptOss
from workbench.model.weights import dense

_INSIDE = (
    "ln1.hook_scale",
    "attn.hook_pattern",
    "attn.hook_z",
    "ln2.hook_scale",
    "mlp.hook_expert_indices",
    "mlp.hook_expert_weights",
    "mlp.experts.hook_gate",
    "mlp.experts.hook_pre",
    "mlp.experts.hook_out",
)

_WIDE = 1024  # d_model from which handing an expert to a thread costs less than it saves


@dataclass
class LayerFlow:
    """What one layer passes on to the target: a value of every node, and the direction each node reads along.

    Values are in units of the target. `expert_reads` is a direction at the stream before the experts; a head of the
    query position p reads the stream of position q along pattern[h, p, q] · head_reads[p, h] · gain / scale[q].
    """

    heads: Float[Tensor, "pos head"]
    head_bias: Float[Tensor, "pos head"]  # of the values' bias, read by the head
    attention_bias: Float[Tensor, " pos"]
    experts: Float[Tensor, "pos slot"]
    expert_constants: Float[Tensor, "pos slot"]  # of the biases inside the expert, and of the 1 that is added to up
    expert_bias: Float[Tensor, " pos"]
    head_outputs: Float[Tensor, "pos head d_head"]  # the direction at the head's weighted values
    expert_reads: Float[Tensor, "pos slot d_model"]


@dataclass
class BackwardFlow:
    """What a backward pass found: of each layer and autoencoder (by its place), and the direction at the embedding."""

    layers: list[LayerFlow]
    features: dict[float, FeatureFlow]
    start: Float[Tensor, "pos d_model"]


class FrozenPass:
    """The recorded activations of one sequence, and the backward pass through them.

    saes: autoencoders by the hook point of the residual stream that each reads, as "blocks.3.hook_resid_post". also:
    further hook points of the blocks that `seen` returns.

    `features` has what is active of each autoencoder, by its place in the order of the pass.

    Raises:
        InputError: an autoencoder does not fit, or is not at the residual stream, or the sequence is so long that its
            attention patterns exceed the memory.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GptOss,
        tokens: Int[Tensor, " pos"],
        saes: Mapping[str, SAE] | None = None,
        *,
        also: Sequence[str] = (),
    ) -> None:
        self.model, self.tokens = model, tokens
        _check_memory(model, len(tokens))
        at = places(model.cfg, saes or {})
        names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in (*_INSIDE, *also)]
        names += list(saes or {})
        end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        names += ["hook_embed", "ln_final.hook_scale", end]
        options: dict[str, Any] = {"names_filter": names, "return_type": None, "return_cache_object": False}
        _, cache = model.run_with_cache(tokens[None], **options)
        last = cache[end][:, -1:].to(model.unembed.weight.device)  # the vocabulary is large: only of the last token
        self.logits: Float[Tensor, " d_vocab"] = model.unembed(model.ln_final(last))[0, -1]
        self.wide = torch.promote_types(model.dtype, torch.float32)
        self._cache = cache
        self.features: dict[float, ActiveFeatures] = {
            order: active_features(name, (saes or {})[name], cache[name][0].to(self.wide)) for order, name in at.items()
        }

    def seen(self, name: str, layer: int | None = None, at: tuple[Tensor, ...] = ()) -> Tensor:
        """Return a recorded activation of the sequence [pos ...], or of these places in it, at least in float32."""
        x: Tensor = self._cache[name if layer is None else f"blocks.{layer}.{name}"][0]
        x = x[at] if at else x
        return x.to(self.wide) if x.is_floating_point() else x

    def pattern(self, layer: int) -> Float[Tensor, "head query key"]:
        """Return the attention pattern; what a row lacks to 1 is on the sink."""
        return self.seen("attn.hook_pattern", layer)

    def head_write(self, layer: int, pos: Tensor, head: Tensor) -> Float[Tensor, "node d_model"]:
        """Return the contribution of heads [node] at positions [node] to the stream, without the output bias."""
        z = self.seen("attn.hook_z", layer, (pos, head))
        return torch.einsum("nd,ndm->nm", z, self.model.blocks[layer].attn.W_O[head].to(self.wide))

    def expert_write(self, layer: int, pos: Tensor, slot: Tensor) -> Float[Tensor, "node d_model"]:
        """Return the contribution of slots [node] at positions [node] to the stream, without the output bias."""
        bias = self.model.blocks[layer].mlp.experts.down.bias.to(self.wide)
        chosen = self.seen("mlp.hook_expert_indices", layer)[pos, slot]
        gates = self.seen("mlp.hook_expert_weights", layer)[pos, slot]
        return gates[:, None] * (self.seen("mlp.experts.hook_out", layer, (pos, slot)) - bias[chosen])

    def neuron_write(self, layer: int, pos: Tensor, slot: Tensor, neuron: Tensor) -> Float[Tensor, "node d_model"]:
        """Return the contribution of neurons [node] of the experts in these slots to the stream."""
        chosen = self.seen("mlp.hook_expert_indices", layer)[pos, slot]
        gates = self.seen("mlp.hook_expert_weights", layer)[pos, slot]
        gate, up = (self.seen(f"mlp.experts.hook_{name}", layer, (pos, slot, neuron)) for name in ("gate", "pre"))
        post = swiglu(gate, up, self.model.cfg.swiglu_limit, self.model.cfg.swiglu_alpha)
        out = gates.new_zeros(len(pos), self.model.cfg.d_model)
        for expert in chosen.unique().tolist():
            rows = chosen == expert
            out[rows] = self.model.blocks[layer].mlp.experts.W_out(expert).to(self.wide)[neuron[rows]]
        return (gates * post)[:, None] * out

    def expert_bias_write(self, layer: int, pos: Tensor) -> Float[Tensor, "node d_model"]:
        """Return the contribution of the experts' output biases to the residual stream at these positions [node]."""
        bias = self.model.blocks[layer].mlp.experts.down.bias.to(self.wide)
        chosen = self.seen("mlp.hook_expert_indices", layer)[pos]
        return torch.einsum("ns,nsm->nm", self.seen("mlp.hook_expert_weights", layer)[pos], bias[chosen])

    def head_reads(self, layer: int, pos: Tensor, head: Tensor, outputs: Float[Tensor, "node d_head"]) -> Tensor:
        """Return the directions [node d_model] that heads with these outputs read, before scale and pattern."""
        block = self.model.blocks[layer]
        read = torch.einsum("nmd,nd->nm", block.attn.W_V[head].to(self.wide), outputs)
        return read * block.ln1.weight.to(self.wide)

    @torch.no_grad()
    def backward(self, end: Float[Tensor, "pos d_model"]) -> "BackwardFlow":
        """Return what each layer and each feature passes on to a direction at the stream after the last block."""
        flows: list[LayerFlow] = []
        features: dict[float, FeatureFlow] = {}
        g = end.to(self.wide)
        for layer in reversed(range(self.model.cfg.n_layers)):
            g = self._through_features(2 * layer + 1.5, g, features)
            experts, g = self._through_experts(layer, g)
            g = self._through_features(2 * layer + 0.5, g, features)
            heads, g = self._through_heads(layer, g)
            flows.append(LayerFlow(**heads, **experts))
        return BackwardFlow(flows[::-1], features, self._through_features(-0.5, g, features))

    @torch.no_grad()
    def direction_after(self, layer: int, end: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """Return a direction at the stream after the last block as that at the stream after this one."""
        g = end.to(self.wide)
        for later in reversed(range(layer + 1, self.model.cfg.n_layers)):
            _, g = self._through_experts(later, self._through_features(2 * later + 1.5, g))
            _, g = self._through_heads(later, self._through_features(2 * later + 0.5, g))
        return self._through_features(2 * layer + 1.5, g)

    def _through_features(
        self, order: float, g: Float[Tensor, "pos d_model"], flows: dict[float, FeatureFlow] | None = None
    ) -> Float[Tensor, "pos d_model"]:
        """Return the direction before the autoencoder at this place, if there is one; `flows` gets its flow."""
        if order not in self.features:
            return g
        flow, g = self.features[order].backward(g)
        if flows is not None:
            flows[order] = flow
        return g

    def _through_experts(self, layer: int, g: Float[Tensor, "pos d_model"]) -> tuple[dict[str, Tensor], Tensor]:
        mlp, block = self.model.blocks[layer].mlp, self.model.blocks[layer]
        chosen, gates = (self.seen(f"mlp.hook_expert_{name}", layer) for name in ("indices", "weights"))
        reads = g.new_zeros(*chosen.shape, g.shape[-1])
        values, constants = g.new_zeros(chosen.shape), g.new_zeros(chosen.shape)
        gain = block.ln2.weight.to(self.wide) / self.seen("ln2.hook_scale", layer)

        def expert_flow(item: tuple[int, Tensor, Tensor]) -> None:
            expert, pos, slot = item
            gate, up = (self.seen(f"mlp.experts.hook_{name}", layer, (pos, slot)) for name in ("gate", "pre"))
            v = gates[pos, slot, None] * _before(g[pos], mlp.experts.down.matrix, expert)
            by_gate, by_up, post, fixed = halves(gate, up, v, self.model.cfg.swiglu_limit, self.model.cfg.swiglu_alpha)
            b_gate, b_up = mlp.experts.b_gate(expert).to(self.wide), mlp.experts.b_in(expert).to(self.wide)
            both = torch.stack([by_gate, by_up], dim=-1).flatten(1)  # the matrix has gate and up in alternation
            reads[pos, slot] = _before(both, mlp.experts.gate_up.matrix, expert) * gain[pos]
            values[pos, slot] = (v * post).sum(-1)
            constants[pos, slot] = by_gate @ b_gate + by_up @ b_up + fixed

        groups = list(self._groups(chosen, g))
        if g.device.type == "cpu" and torch.get_num_threads() > 1 and g.shape[-1] >= _WIDE:
            parallel_map(expert_flow, groups)  # each writes other places
        else:
            for item in groups:
                expert_flow(item)
        bias = mlp.experts.down.bias.to(self.wide)
        expert_bias = (gates * (g @ bias.mT).gather(-1, chosen)).sum(-1)
        parts = {"experts": values, "expert_constants": constants, "expert_bias": expert_bias, "expert_reads": reads}
        return parts, g + reads.sum(1)

    def _groups(self, chosen: Int[Tensor, "pos slot"], g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert with the positions and slots that chose it, where the direction is not zero."""
        reached = (g != 0).any(-1)
        for expert in chosen[reached].unique().tolist():
            pos, slot = ((chosen == expert) & reached[:, None]).nonzero(as_tuple=True)
            yield expert, pos, slot

    def _through_heads(self, layer: int, g: Float[Tensor, "pos d_model"]) -> tuple[dict[str, Tensor], Tensor]:
        block = self.model.blocks[layer]
        attn, pattern = block.attn, self.pattern(layer)
        outputs = torch.einsum("pm,hdm->phd", g, attn.W_O.to(self.wide))
        z = self.seen("attn.hook_z", layer)
        read = torch.einsum("hpq,phd->qhd", pattern, outputs)
        back = torch.einsum("qhd,hmd->qm", read, attn.W_V.to(self.wide))
        gain = block.ln1.weight.to(self.wide) / self.seen("ln1.hook_scale", layer)
        bias = torch.einsum("phd,hd->ph", outputs, attn.b_V.to(self.wide)) * pattern.sum(-1).mT
        parts = {
            "heads": (outputs * z).sum(-1),
            "head_bias": bias,
            "attention_bias": g @ attn.b_O.to(self.wide),
            "head_outputs": outputs,
        }
        return parts, g + back * gain


def _before(
    g: Float[Tensor, "node outputs"], matrix: Mxfp4 | GgmlMxfp4 | LoraWeight | Tensor, expert: int
) -> Float[Tensor, "node inputs"]:
    """Return directions at the outputs of an expert's matrix as those at its inputs."""
    if isinstance(matrix, Mxfp4) and g.device.type == "cpu":  # some rows at a time, unpacked by the compiled kernel
        return input_gradient(g, *matrix.at(expert))
    return g @ dense(matrix, expert).to(g.dtype).mT


def _check_memory(model: GptOss, n_tokens: int) -> None:
    """Refuse a sequence whose attention patterns, of all layers and once more of one in float32, exceed the memory."""
    free, cfg = memory.free(model.device), model.cfg
    square = cfg.n_heads * (cfg.n_layers * model.dtype.itemsize + 4)  # bytes of a pair of tokens
    if square * n_tokens**2 > free:
        raise InputError(
            f"{n_tokens:,} tokens: their attention patterns take {memory.human(square * n_tokens**2)}, and the memory "
            f"is {memory.human(free)}: explain a token within the first {math.isqrt(free // square):,} tokens"
        )


def halves(
    gate: Float[Tensor, "node neuron"],
    up: Float[Tensor, "node neuron"],
    v: Float[Tensor, "node neuron"],
    limit: float,
    alpha: float,
) -> tuple[Any, ...]:
    """Return the coefficients of gate and up, the activation, and the constant of a · (up + 1) shared out in halves.

    v: what the target gains from each neuron's activation. The first three are [node neuron], the constant [node].
    """
    clamped_gate, clamped_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * clamped_gate)
    a, b = clamped_gate * sigmoid, clamped_up + 1
    by_gate = v * b / 2 * torch.where(gate > limit, limit / gate, torch.ones_like(gate)) * sigmoid
    by_up = v * a / 2 * torch.where(up.abs() > limit, limit / up.abs(), torch.ones_like(up))
    return by_gate, by_up, a * b, (v * a / 2).sum(-1)
