"""What single neurons of routed experts add to the residual stream, for TransformerLens' decomposition methods.

A neuron of a mixture of experts is a pair of a slot and a number below d_mlp: which expert's neuron it is depends on
the token (`cache["expert_indices", layer]`). It adds gate weight × activation × its row of W_out; the expert's bias is
added once for each slot and is not a neuron's.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice


def neuron_results(
    cache: Any, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_onto: Tensor | None = None
) -> Float[Tensor, "*batch_pos slot_neuron outputs"]:
    """Return the contribution of each neuron of the routed experts to the residual stream, slots first, then neurons.

    pos_slice, neuron_slice: as in TransformerLens; an int keeps its axis for neurons and removes it for positions.
    project_onto: [d_model outputs] directions to project on before the neurons are expanded, which needs d_model /
    outputs times less memory. Without it the result has batch · pos · slots · d_mlp · d_model values.
    """
    experts, gates, post = (
        _slice(pos_slice).apply(cache[name, layer], dim=dim)
        for name, dim in (("expert_indices", -2), ("expert_weights", -2), ("post", -3))
    )
    chosen = _slice(neuron_slice)
    if chosen.mode == "int":
        chosen = Slice([chosen.slice])
    amount = (post * gates[..., None].to(post.dtype)).flatten(0, -2)
    expert_layer = cache.model.blocks[layer].mlp.experts
    selected = chosen.apply(amount, dim=-1)
    outputs = cache.model.cfg.d_model if project_onto is None else project_onto.shape[-1]
    out = selected.new_zeros(*selected.shape, outputs)
    for expert in experts.unique().tolist():
        rows = (experts == expert).flatten()
        directions = chosen.apply(expert_layer.W_out(expert), dim=0).to(out.dtype)
        if project_onto is not None:
            directions = directions @ project_onto.to(out.dtype)
        out[rows] = selected[rows][..., None] * directions
    return out.unflatten(0, experts.shape).flatten(-3, -2)


def expert_biases(cache: Any, layer: int, pos_slice: Any = None) -> Float[Tensor, "*batch_pos d_model"]:
    """Return the contribution of the routed experts' biases to the residual stream, weighted by the gates."""
    experts, gates = (
        _slice(pos_slice).apply(cache[name, layer], dim=-2) for name in ("expert_indices", "expert_weights")
    )
    biases = cache.model.blocks[layer].mlp.experts.down.bias
    return torch.einsum("...s,...sd->...d", gates.to(biases.dtype), biases[experts.long()])


def neuron_labels(layer: int, slots: int, neurons: Int[Tensor, " neuron"]) -> list[str]:
    """Return L0S1N5 and so on: layer, slot and number of the neuron, in the order of `neuron_results`."""
    return [f"L{layer}S{slot}N{neuron}" for slot in range(slots) for neuron in neurons.tolist()]


def _slice(given: Any) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)
