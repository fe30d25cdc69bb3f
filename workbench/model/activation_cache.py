"""The activations of a pass by hook name or by short name, as in `cache["sink", 1]`.

TransformerLens' ActivationCache, with the names of a mixture of experts, and with what its methods need of one: the
contribution of every neuron of every expert, and the experts' biases, which depend on the routing.

Reference: TransformerLens 4.3, ActivationCache.py.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache as _ActivationCache
from transformer_lens.utilities import Slice

from workbench.errors import InputError
from workbench.hooks.names import closest_names, full_name
from workbench.model.neuron_results import expert_biases, neuron_labels, neuron_results


class ActivationCache(_ActivationCache):
    """Activations by name; `cache["resid_post", -1]` is the last layer's, `cache["router", 0]` its router logits."""

    def __getitem__(self, key: Any) -> Tensor:
        """Return an activation.

        Raises:
            InputError: no activation in the cache has this name; the message lists the nearest ones.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        name = full_name(key, self.model.cfg.n_layers)
        if name not in self.cache_dict:
            raise MissingActivationError(
                f"{key!r} is not in the cache"
                + (f" (its hook point is {name!r})" if name != key else "")
                + f"; {closest_names(name, self.cache_dict)}"
            )
        return self.cache_dict[name]

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """Return the contribution of each neuron of routed experts [… pos slot·d_mlp d_model]; see `neuron_results`."""
        onto, squeeze = _as_matrix(project_output_onto)
        out = neuron_results(self, layer, neuron_slice, pos_slice, onto)
        return out[..., 0] if squeeze else out

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """Return the contribution of each neuron of the routed experts before `layer` [component … pos d_model].

        Labels are L0S1N5: layer, slot, neuron. Arguments as in TransformerLens.
        """
        layer = self.model.cfg.n_layers if layer in (None, -1) else layer
        onto, squeeze = _as_matrix(project_output_onto)
        early = None if apply_ln else onto  # the norm acts before the projection
        stream = (
            self["embed"] if layer == 0 else self["resid_mid", layer] if mlp_input else self["resid_post", layer - 1]
        )
        stream = _positions(stream, pos_slice)
        neurons = neuron_slice if isinstance(neuron_slice, Slice) else Slice(neuron_slice)
        neurons = Slice([neurons.slice]) if neurons.mode == "int" else neurons
        numbers = neurons.apply(torch.arange(self.model.cfg.d_mlp), dim=0)
        parts, labels = [], list[str]()
        for at in range(layer):
            parts.append(neuron_results(self, at, neurons, pos_slice, early).movedim(-2, 0))
            labels += neuron_labels(at, self.model.cfg.experts_per_token, numbers)
        stack = torch.cat(parts) if parts else stream.new_zeros(0, *(stream if early is None else stream @ early).shape)
        if incl_remainder:
            rest = stream if early is None else stream @ early.to(stream.dtype)
            stack, labels = torch.cat([stack, (rest - stack.sum(0))[None]]), [*labels, "remainder"]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice, mlp_input=mlp_input)
            stack = stack if onto is None else stack @ onto.to(stack.dtype)
        stack = stack[..., 0] if squeeze else stack
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """Return the components of what enters `layer`, [component … pos d_model]: their sum is the residual stream.

        Heads, neurons of the routed experts (L0S1N5), the biases of the routed experts (L0_expert_bias), the embedding,
        and the biases of attention. Without `expand_neurons` a layer's experts are one component, as in
        TransformerLens. apply_ln divides by the cached scale, as there; the gain of the final norm belongs to the
        directions, which `model.tokens_to_residual_directions` has.
        """
        options = {"pos_slice": pos_slice, "mlp_input": mlp_input}
        if not expand_neurons:
            return super().get_full_resid_decomposition(
                layer,
                expand_neurons=False,
                apply_ln=apply_ln,
                return_labels=return_labels,
                project_output_onto=project_output_onto,
                **options,
            )
        layer = self.model.cfg.n_layers if layer in (None, -1) else layer
        onto, squeeze = _as_matrix(project_output_onto)
        early = None if apply_ln else onto
        stack, labels = super().get_full_resid_decomposition(
            layer, expand_neurons=False, return_labels=True, project_output_onto=early, **options
        )
        neurons, neuron_names = self.stack_neuron_results(
            layer, pos_slice, return_labels=True, project_output_onto=early
        )
        biases = [expert_biases(self, at, pos_slice) for at in range(layer)]
        biases = [bias if early is None else bias @ early.to(bias.dtype) for bias in biases]
        experts = [i for i, label in enumerate(labels) if label.endswith("_mlp_out")]
        first, last = (experts[0], experts[-1] + 1) if experts else (0, 0)
        stack = torch.cat([stack[:first], neurons, *(bias[None] for bias in biases), stack[last:]])
        labels = [*labels[:first], *neuron_names, *(f"L{at}_expert_bias" for at in range(layer)), *labels[last:]]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, **options)
            stack = stack if onto is None else stack @ onto.to(stack.dtype)
        stack = stack[..., 0] if squeeze else stack
        return (stack, labels) if return_labels else stack


def _positions(stream: Tensor, pos_slice: Any) -> Tensor:
    return (pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)).apply(stream, dim=-2)


def _as_matrix(directions: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return directions as [d_model outputs], and whether the last axis was added."""
    if directions is None or directions.ndim == 2:
        return directions, False
    return directions[:, None], True


class MissingActivationError(InputError, KeyError):
    """A name that is not in a cache."""

    __str__ = ValueError.__str__
