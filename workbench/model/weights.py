"""Weights and token helpers under TransformerLens' names and shapes, for its tools and its users.

Weights are read when they are accessed, and experts are dequantised one at a time. W_K and W_V are repeated for every
query head that uses them. The update of an adapter is included.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from workbench.errors import InputError
from workbench.kernels.ggml import GgmlMxfp4
from workbench.kernels.moe import LoraWeight
from workbench.kernels.mxfp4 import Mxfp4, dequantise
from workbench.model.low_rank import Linear


class AttentionWeights:
    """W_Q, W_K, W_V [head d_model d_head], W_O [head d_head d_model], b_Q, b_K, b_V [head d_head], b_O [d_model]."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    sinks: Any
    d_head: int

    W_Q = property(lambda self: self._by_head(self.q.matrix).mT)
    W_K = property(lambda self: self._by_head(self.k.matrix).mT)
    W_V = property(lambda self: self._by_head(self.v.matrix).mT)
    W_O = property(lambda self: self.o.matrix.mT.unflatten(0, (-1, self.d_head)))
    b_Q = property(lambda self: self._by_head(self.q.bias))
    b_K = property(lambda self: self._by_head(self.k.bias))
    b_V = property(lambda self: self._by_head(self.v.bias))
    b_O = property(lambda self: self.o.bias)

    @property
    def QK(self) -> FactoredMatrix:
        """Return W_Q · W_Kᵀ of every head, before rotation and scale."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """Return W_V · W_O of every head."""
        return FactoredMatrix(self.W_V, self.W_O)

    def _by_head(self, rows: Shaped[Tensor, "own *rest"]) -> Shaped[Tensor, "head d_head *rest"]:
        own = rows.unflatten(0, (-1, self.d_head))
        return own.repeat_interleave(len(self.sinks) // len(own), 0)


class ExpertWeights:
    """The dense matrices of one expert: W_gate, W_in (up) [d_model d_mlp], W_out [d_mlp d_model], and their biases."""

    gate_up: Any
    down: Any

    def W_gate(self, expert: int) -> Float[Tensor, "d_model d_mlp"]:
        """Return the matrices whose output gates the activation."""
        return dense(self.gate_up.matrix, expert)[:, 0::2]

    def W_in(self, expert: int) -> Float[Tensor, "d_model d_mlp"]:
        """Return the up-projection matrix; its output plus one is multiplied by the gate's activation."""
        return dense(self.gate_up.matrix, expert)[:, 1::2]

    def W_out(self, expert: int) -> Float[Tensor, "d_mlp d_model"]:
        """Return the down-projection matrix, which maps neurons to the residual stream."""
        return dense(self.down.matrix, expert)

    def b_gate(self, expert: int) -> Float[Tensor, " d_mlp"]:
        """Return the biases of the gate."""
        return self.gate_up.bias[expert, 0::2]

    def b_in(self, expert: int) -> Float[Tensor, " d_mlp"]:
        """Return the biases of what is gated."""
        return self.gate_up.bias[expert, 1::2]

    def b_out(self, expert: int) -> Float[Tensor, " d_model"]:
        """Return the biases of the outputs, which the gate weight multiplies, too."""
        return self.down.bias[expert]


def dense(matrix: Mxfp4 | GgmlMxfp4 | LoraWeight | Tensor, expert: int) -> Float[Tensor, "inputs outputs"]:
    """Return the dequantised matrix of one expert [inputs outputs], including the update of an adapter."""
    if isinstance(matrix, LoraWeight):
        base = dense(matrix.base, expert)
        return base + (matrix.a[expert] @ matrix.b[expert]).to(base.dtype)
    return dequantise(*matrix.at(expert)).mT if isinstance(matrix, Mxfp4 | GgmlMxfp4) else matrix[expert]


class ExpertBiases:
    """The biases of all experts of a layer: b_gate, b_in (up) [expert d_mlp], b_out [expert d_model]."""

    experts: Any

    b_gate = property(lambda self: self.experts.gate_up.bias[:, 0::2])
    b_in = property(lambda self: self.experts.gate_up.bias[:, 1::2])
    b_out = property(lambda self: self.experts.down.bias)


class ModelWeights:
    """Weights of all layers, stacked on the first layer's device, and token helpers for TransformerLens' tools."""

    blocks: Any
    embed: Any
    unembed: Any
    ln_final: Any
    cfg: Any
    tokenizer: Any

    W_E = property(lambda self: self.embed.weight)
    W_U = property(lambda self: self.unembed.W_U)
    b_U = property(lambda self: torch.zeros(self.cfg.d_vocab, device=self.unembed.weight.device))
    W_Q = property(lambda self: self._stacked("W_Q"))
    W_K = property(lambda self: self._stacked("W_K"))
    W_V = property(lambda self: self._stacked("W_V"))
    W_O = property(lambda self: self._stacked("W_O"))
    b_Q = property(lambda self: self._stacked("b_Q"))
    b_K = property(lambda self: self._stacked("b_K"))
    b_V = property(lambda self: self._stacked("b_V"))
    b_O = property(lambda self: self._stacked("b_O"))

    @property
    def b_gate(self) -> Float[Tensor, "layer expert d_mlp"]:
        """Return the biases of every expert's gate.

        Raises:
            InputError: layers have different numbers of experts.
        """
        return self._expert_biases("b_gate")

    @property
    def b_in(self) -> Float[Tensor, "layer expert d_mlp"]:
        """Return the biases of what is gated.

        Raises:
            InputError: layers have different numbers of experts.
        """
        return self._expert_biases("b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer expert d_model"]:
        """Return the biases of the outputs.

        Raises:
            InputError: layers have different numbers of experts.
        """
        return self._expert_biases("b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """Return [layer head d_model d_model], in its two factors."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """Return [layer head d_model d_model], in its two factors."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head later_layer later_head"]:
        """Return how much each head writes into what later heads read: mode "Q", "K" or "V" as in TransformerLens.

        ‖OV · M‖ / (‖OV‖ ‖M‖) in the Frobenius norm, with M the later head's QK, QKᵀ or OV after the gain of its norm;
        zero where the second layer is not later. Rotary positions are left out, so Q and K hold for tokens at
        one position.

        Raises:
            InputError: another mode.
        Reference: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f"mode {mode!r}: expected 'Q', 'K' or 'V'")
        gain = torch.stack([block.ln1.weight.to(self.W_Q.device) for block in self.blocks])[:, None, :, None]
        q, k, v = (weight.float() * gain.float() for weight in (self.W_Q, self.W_K, self.W_V))
        read = {"Q": (q, k.mT), "K": (k, q.mT), "V": (v, self.W_O.float())}[mode]
        left = FactoredMatrix(self.W_V.float(), self.W_O.float())
        scores = composition_scores(left, FactoredMatrix(*read), broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        return scores * (layers[:, None, None, None] < layers[None, None, :, None])

    def get_params(self) -> dict[str, Tensor]:
        """Return the weights by TransformerLens' names, without the experts' matrices, which would be dequantised.

        An expert's matrices are `model.blocks[0].mlp.experts.W_in(5)`, `W_gate(5)` and `W_out(5)`.
        """
        params = {"embed.W_E": self.W_E, "unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        params["ln_final.w"] = self.ln_final.weight
        for layer, block in enumerate(self.blocks):
            names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "sinks")
            params |= {f"blocks.{layer}.attn.{name}": getattr(block.attn, name) for name in names}
            params |= {f"blocks.{layer}.{norm}.w": getattr(block, norm).weight for norm in ("ln1", "ln2")}
            router = block.mlp.router
            params |= {f"blocks.{layer}.mlp.router.W": router.weight.mT, f"blocks.{layer}.mlp.router.b": router.bias}
        return params

    tl_parameters = get_params

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over the names and weights of `get_params`, as W_Q [head d_model d_head]."""
        return iter(self.get_params().items())

    @property
    def n_params_total(self) -> int:
        """Return the number of weights, every expert's included."""
        return int(self.cfg.n_params)

    def blocks_with(self, submodule: str) -> list[tuple[int, Any]]:
        """Return the number and the block of every block that has a part of this name, such as "attn"."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if hasattr(block, submodule)]

    def composition_layer_indices(self) -> list[int]:
        """Return the layers of `all_composition_scores`: all."""
        return list(range(self.cfg.n_layers))

    @property
    def attn_head_labels(self) -> list[str]:
        """Return L0H0 and so on, a label for each head, as `all_head_labels()`."""
        return self.all_head_labels()

    def all_head_labels(self) -> list[str]:
        """Return L0H0 and so on, a label for each head."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the attention biases in the stream before `layer`. Experts' biases depend on the routing: refused.

        Raises:
            InputError: biases of experts are asked for, which depend on the routing.
        """
        if include_mlp_biases:
            raise InputError(
                "an expert's bias is added only at tokens that select the expert, so the biases have no fixed sum: use "
                "expand_neurons=False or include_mlp_biases=False, or workbench.experiments.attribution for each bias"
            )
        return sum(
            (block.attn.b_O for block in self.blocks[: layer + int(mlp_input)]), torch.zeros_like(self.ln_final.weight)
        )

    def _stacked(self, name: str) -> Tensor:
        parts = [getattr(block.attn, name) for block in self.blocks]
        return torch.stack([part.to(parts[0].device) for part in parts])

    def _expert_biases(self, name: str) -> Tensor:
        parts = [getattr(block.mlp, name) for block in self.blocks]
        if len(numbers := {len(part) for part in parts}) > 1:
            raise InputError(
                f"{name} of all layers: the layers have {min(numbers)} to {max(numbers)} experts, expected one number; "
                f"use model.blocks[0].mlp.{name} of each layer"
            )
        return torch.stack([part.to(parts[0].device) for part in parts])
